"""Runs the clients against one server and writes the table of docs/compatibility.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from sglang_fields import defaults_of_sglang

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MODEL = ROOT / "models" / "tiny-nsa"
SGLANG_VERSIONS = ("0.5.9", "0.5.12")
REQUESTS = 16  # of a benchmark
TIMEOUT = 600  # seconds for one client
BEGIN, END = "<!-- clients: begin -->", "<!-- clients: end -->"
# No client may look for anything but the server.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGCHAIN_TRACING_V2": "false",
    "GUIDELLM__LOGGING__DISABLED": "true",
}


class Failed(Exception):
    """A client did not do what it was asked for."""


@dataclass(frozen=True)
class Check:
    client: str
    version: str
    what: str
    run: Callable[[], str]  # gives the result; raises Failed


def command(*argv: str | Path, **env: str) -> str:
    """The output of a command. Raises Failed with its last lines."""
    try:
        result = subprocess.run(
            [str(word) for word in argv],
            cwd=ROOT,  # the tasks of lm_eval name their data from there
            env=os.environ | OFFLINE | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"not done in {TIMEOUT} s") from error
    if result.returncode:
        raise Failed(f"exit status {result.returncode}: {' / '.join(result.stdout.splitlines()[-5:])}")
    return result.stdout


def bench_serving(url: str, source: Path, backend: str, *flags: str) -> Callable[[], str]:
    """SGLang's own benchmark, from its wheel."""

    def run() -> str:
        output = command(
            *(sys.executable, "-m", "sglang.bench_serving", "--backend", backend, "--base-url", url),
            *("--model", "tiny-nsa", "--tokenizer", MODEL, "--dataset-name", "random-ids"),
            *("--random-input-len", "64", "--random-output-len", "32", "--num-prompts", str(REQUESTS)),
            *("--output-file", os.devnull, *flags),
            PYTHONPATH=str(source),
        )
        found = {
            name.strip(): float(value)
            for name, value in re.findall(r"^([A-Z][\w ()]+):\s+([\d.]+)\s*$", output, re.MULTILINE)
        }
        if found.get("Successful requests") != REQUESTS:
            raise Failed(f"successful requests: {found.get('Successful requests')} of {REQUESTS}")
        accept = found.get("Accept length")
        return f"{REQUESTS} of {REQUESTS} requests" + (f", accept length {accept}" if accept else "")

    return run


def sglang_fields(url: str, source: Path) -> Callable[[], str]:
    """Every field that SGLang's requests have, each with its default, is accepted."""

    def run() -> str:
        counts = []
        for path, body in defaults_of_sglang(source):
            request = urllib.request.Request(url + path, json.dumps(body).encode())
            request.add_header("content-type", "application/json")
            try:
                urllib.request.urlopen(request, timeout=TIMEOUT).read()
            except urllib.error.HTTPError as error:
                raise Failed(f"{path}: {error.read().decode()}") from error
            counts.append(f"{len(body)} of {path}")
        return "accepted: " + ", ".join(counts)

    return run


def script(url: str, name: str) -> Callable[[], str]:
    """One of the scripts beside this one; its last line is the result."""
    return lambda: command(sys.executable, HERE / name, url).strip().splitlines()[-1]


def lm_eval(url: str, work: Path, task: str, metric: str) -> Callable[[], str]:
    def run() -> str:
        arguments = {"model": "tiny-nsa", "base_url": url + "/v1/completions", "tokenizer": MODEL}
        arguments |= {"tokenizer_backend": "huggingface", "num_concurrent": 2}
        output = work / "lm_eval"
        command(
            *(sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", task),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--include_path", HERE / "lm_eval_tasks", "--output_path", output),
        )
        latest = max(output.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
        value = json.loads(latest.read_text())["results"][task][f"{metric},none"]
        if value != 1:
            raise Failed(f"{metric} {value}")
        return f"{metric} {value:.2f}"

    return run


def guidellm(url: str, work: Path, path: str) -> Callable[[], str]:
    def run() -> str:
        report = work / "guidellm.json"
        command(
            *(Path(sys.executable).with_name("guidellm"), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={url},model=tiny-nsa,request_format={path}"),
            *("--tokenizer", f"kind=hf_auto,model={MODEL}", "--profile", "kind=concurrent,streams=2"),
            *("--constraint", "kind=max_requests,count=8", "--output", f"kind=json,path={report}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
        )
        totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
        # It may leave the last one out of its figures, when it has what it needs.
        if totals["successful"] < 7 or totals["errored"] or totals["incomplete"]:
            raise Failed(str(totals))
        return f"{totals['successful']} requests, none failed"

    return run


def checks(url: str, work: Path) -> Iterator[Check]:
    for number in SGLANG_VERSIONS:
        source = work / f"sglang-{number}"
        newer = ("--flush-cache", "--return-logprob")
        newer += () if number == "0.5.9" else ("--top-logprobs-num", "2", "--logprob-start-len", "0")
        for backend, flags in (
            ("sglang", ()),
            ("sglang", newer),
            ("sglang-oai", ()),
            ("sglang-oai-chat", ()),
            ("vllm", ("--disable-stream",)),
        ):
            what = " ".join(["`bench_serving", "--backend", backend, *flags]) + "`"
            yield Check("sglang", number, what, bench_serving(url, source, backend, *flags))
        what = "fields of `GenerateReqInput`, `CompletionRequest`, `ChatCompletionRequest`"
        yield Check("sglang", number, what, sglang_fields(url, source))
    what = "completions, chat, streams, logprobs, echo, async"
    yield Check("openai", version("openai"), what, script(url, "openai_client.py"))
    for task, metric, what in (
        ("code_choice", "acc", "loglikelihood"),
        ("code_generate", "exact_match", "generation"),
    ):
        run = lm_eval(url, work, task, metric)
        yield Check("lm_eval", version("lm_eval"), f"{what}: `local-completions`, a local task", run)
    for path in ("/v1/completions", "/v1/chat/completions"):
        yield Check("guidellm", version("guidellm"), f"`{path}`, concurrent", guidellm(url, work, path))
    what = "completions, chat, streams"
    yield Check("litellm", version("litellm"), what, script(url, "litellm_client.py"))
    what = "`OpenAI` and `ChatOpenAI`: invoke, batch, stream, a second turn"
    yield Check("langchain-openai", version("langchain-openai"), what, script(url, "langchain_client.py"))


@contextlib.contextmanager
def server(python: str, log: Path) -> Iterator[str]:
    """A fresh one on a free port; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A command line as SGLang's users write it.
    argv = [python, "-m", "sglang.launch_server", "--model", MODEL, "--served-model-name", "tiny-nsa"]
    argv += ["--port", port, "--tp", "1", "--trust-remote-code", "--attention-backend", "nsa"]
    argv += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "4", "--enable-metrics"]
    path = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path, "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": "1"}
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen([str(word) for word in argv], env=env, stdout=out, stderr=out)
        try:
            while True:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended:\n{log.read_text()}")
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url + "/health_generate", timeout=30).read()
                    break
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def write_table(rows: list[str], path: Path | None) -> None:
    lines = ["| client | version | what | result |", "|---|---|---|---|", *rows]
    table = f"Run on {date.today()}.\n\n" + "\n".join(lines) + "\n"
    if path is None:
        print(table)
        return
    text = path.read_text()
    head, _, rest = text.partition(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{table}{END}{rest.partition(END)[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server-python", required=True, help="runs the server")
    parser.add_argument("--work", type=Path, required=True, help="where SGLang's wheels are unpacked")
    parser.add_argument("--table", type=Path, help="the file whose table is replaced")
    parser.add_argument("--only", default="", help="a piece of the names of what is run")
    args = parser.parse_args()
    if args.table and not (args.table.is_file() and BEGIN in args.table.read_text()):
        parser.error(f"--table {args.table}: no file with the line {BEGIN}")
    rows, failures = [], 0
    work = args.work.resolve()
    with server(args.server_python, work / "server.log") as url:
        for check in checks(url, work):
            if args.only not in f"{check.client} {check.what}":
                continue
            try:
                result = check.run()
            except Failed as error:
                result, failures = f"**failed**: {error}", failures + 1
            rows.append(f"| {check.client} | {check.version} | {check.what} | {result} |")
            print(rows[-1], flush=True)
    write_table(rows, args.table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
