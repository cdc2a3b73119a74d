// Requests to the server: the key, the errors in its own words, and streams.

const KEY = "sglang-api-key"; // in the tab's session only

export class ServerError extends Error {}

// Answers of the server; asks for the key, again and again, while the server wants another.
// `askKey(message)` resolves to a key, or to null where the user gives up.
export class Client {
  constructor(askKey) {
    this.askKey = askKey;
  }

  async json(path) {
    const response = await this.fetch(path, {});
    return response.json();
  }

  // The objects of the events of a POST, until [DONE]. Throws ServerError where the server or the connection fails.
  async *events(path, body, signal) {
    const options = {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    };
    const response = await this.fetch(path, options);
    for await (const data of eventData(response.body, signal)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message);
      yield event;
    }
    throw new ServerError("The connection ended before the answer did.");
  }

  async fetch(path, options) {
    let key = sessionStorage.getItem(KEY);
    for (;;) {
      const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
      const response = await reach(path, { ...options, headers });
      if (response.status !== 401) {
        if (key) sessionStorage.setItem(KEY, key);
        if (response.ok) return response;
        throw new ServerError(await reason(response));
      }
      key = await this.askKey(key ? "The server refused this key." : "");
      if (key === null) throw new ServerError(await reason(response));
    }
  }
}

async function reach(path, options) {
  try {
    return await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The server cannot be reached (${error.message}).`);
  }
}

async function reason(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}: ${text.slice(0, 500)}`;
  }
}

async function* eventData(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ServerError(`The connection was lost (${error.message}).`);
    }
    if (part.done) return;
    const events = (buffer + part.value).split("\n\n");
    buffer = events.pop();
    for (const event of events) yield event.replace(/^data: /, "");
  }
}
