// Puts the page together: what the server is, one request at a time, and what it says of itself meanwhile.

import { Answer } from "./answer.js";
import { Chart } from "./chart.js";
import { Client, ServerError } from "./client.js";

const POLL_MS = 1000; // of the server's state while an answer comes

const $ = (id) => document.getElementById(id);
const client = new Client(askKey);
const answer = new Answer($("answer"), $("sources"));
const acceptLength = new Chart($("accept-length"), $("accept-chart"));
const speed = new Chart($("speed"), $("speed-chart"));
let steps = null; // draft steps of a verification, 0 without speculation; null: not connected
let replaysBefore = null; // of the request at hand
let running = null; // its AbortController

// -- what the server is

async function connect() {
  $("description").textContent = "Not connected";
  const info = await showState();
  const model = await client.json("get_model_info");
  steps = info.speculative_num_steps ?? 0;
  document.title = `${info.served_model_name} · sglang-nsa`;
  $("model").textContent = info.served_model_name;
  const drafts = steps ? `${steps} draft steps (${info.speculative_algorithm})` : "no speculation";
  $("description").textContent = `${info.device}, ${drafts}, context of ${info.context_length} tokens`;
  showExamples(model.example_prompts);
  answer.start("", steps);
}

function showExamples(examples) {
  $("examples").hidden = examples.length === 0;
  examples.forEach((example, i) => {
    const label = document.createElement("label");
    const radio = document.createElement("input");
    Object.assign(radio, { type: "radio", name: "example", id: `example-${i}`, checked: i === 0 });
    radio.addEventListener("change", () => ($("prompt").value = example.text));
    label.append(radio, example.title);
    $("example-list").append(label);
  });
  if (examples.length && !$("prompt").value) $("prompt").value = examples[0].text;
}

async function showState() {
  const info = await client.json("get_server_info");
  const metadata = info.internal_states[0].nsa_metadata;
  const now = metadata.replays;
  const replays = replaysBefore === null ? "" : ` (+${now - replaysBefore} with this answer)`;
  const rows = {
    Path: metadata.layout,
    "Copied by": metadata.copy,
    "Draft backends": metadata.draft_backends,
    Replays: now.toLocaleString("en") + replays,
    Fallbacks: metadata.fallbacks + (metadata.fallback_reason ? `: ${metadata.fallback_reason}` : ""),
  };
  $("metadata").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => {
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      text.textContent = value ?? "–";
      return [term, text];
    }),
  );
  return info;
}

// -- one request

async function complete() {
  running = new AbortController();
  begin();
  const body = {
    text: $("prompt").value,
    sampling_params: {
      max_new_tokens: $("max-new-tokens").valueAsNumber,
      temperature: $("temperature").valueAsNumber,
    },
    stream: true,
    return_token_sources: true,
  };
  const sent = performance.now();
  const polling = setInterval(() => showState().catch(() => {}), POLL_MS); // the stream reports a loss
  try {
    if (steps === null) await connect();
    answer.start(body.text, steps);
    replaysBefore = (await client.json("get_server_info")).internal_states[0].nsa_metadata.replays;
    let first = null; // tokens of the first event and when it came: speed counts from there
    for await (const event of client.events("generate", body, running.signal)) {
      const meta = event.meta_info;
      const now = performance.now();
      answer.show(event);
      if (meta.spec_accept_length) acceptLength.add(meta.completion_tokens, meta.spec_accept_length);
      first ??= { tokens: meta.completion_tokens, now };
      const tokens = meta.completion_tokens - first.tokens;
      if (tokens) speed.add(meta.completion_tokens, (1000 * tokens) / (now - first.now));
      $("status").textContent = `${meta.completion_tokens} tokens`;
      if (meta.finish_reason) showEnd(meta, now - sent);
    }
    await showState();
  } catch (error) {
    if (error.name === "AbortError") $("status").textContent += ", stopped";
    else showError(error);
  } finally {
    clearInterval(polling);
    running = null;
    end();
  }
}

function begin() {
  $("error").hidden = true;
  $("status").textContent = "Waiting for the first token…";
  acceptLength.start();
  speed.start();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("answer").setAttribute("aria-busy", "true");
}

function end() {
  const back = document.activeElement === $("stop") || document.activeElement === document.body;
  $("send").disabled = false;
  $("stop").disabled = true;
  $("answer").removeAttribute("aria-busy");
  if (back) $("send").focus(); // a disabled button would lose the focus
}

function showEnd(meta, milliseconds) {
  const reason = meta.finish_reason;
  const why = reason.type === "stop" ? `stopped at ${JSON.stringify(reason.matched)}` : `ended by ${reason.type}`;
  const seconds = (milliseconds / 1000).toFixed(2);
  $("status").textContent = `${meta.completion_tokens} tokens in ${seconds} s, ${why}`;
}

function showError(error) {
  if (!(error instanceof ServerError)) console.error(error);
  $("status").textContent = "";
  $("error").textContent = error.message;
  $("error").hidden = false;
}

// -- the key

function askKey(message) {
  $("key-message").textContent = message;
  $("key").value = "";
  $("key-dialog").showModal();
  $("key").focus();
  return new Promise((resolve) => {
    const answered = new AbortController();
    const finish = (key) => {
      answered.abort();
      $("key-dialog").close();
      resolve(key);
    };
    const once = { signal: answered.signal };
    const use = (event) => (event.preventDefault(), finish($("key").value));
    $("key-form").addEventListener("submit", use, once);
    $("key-cancel").addEventListener("click", () => finish(null), once);
    $("key-dialog").addEventListener("cancel", () => finish(null), once); // Esc
  });
}

// -- events

$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) complete();
});
$("stop").addEventListener("click", () => running?.abort());
$("numbers").addEventListener("change", () => $("answer").classList.toggle("numbered", $("numbers").checked));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key-dialog").open) running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) $("request").requestSubmit();
});

connect().catch(showError);
