"""The arguments: what the command line gives, what is derived, and every combination that is refused."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from forked import ForkedProcess, run_server
from sglang.srt.arguments import Parser, flag
from sglang.srt.environ import EnvFlag, envs, parse_bool
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.sglang_args import SGLangArgs

PRECOMPUTE = envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA
NEXTN = {"speculative_algorithm": "NEXTN"}


def make(**values: Any) -> ServerArgs:
    return ServerArgs(**({"model_path": "m", "device": "cpu"} | values))


def test_command_line_reaches_every_field() -> None:
    argv = ["--model-path", "m", "--device", "cpu", "--page-size", "16", "--api-key", "k"]
    argv += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--disable-radix-cache"]
    args = ServerArgs.from_cli(argv)
    expected = make(
        page_size=16,
        api_key="k",
        speculative_algorithm="EAGLE",
        speculative_num_steps=3,
        disable_radix_cache=True,
    )
    assert args == expected
    parser = Parser("test", ServerArgs)
    options = {option for action in parser._actions for option in action.option_strings}
    assert {flag(f.name) for f in dataclasses.fields(ServerArgs)} <= options


def test_defaults_are_derived() -> None:
    plain, speculative = make(), make(**NEXTN)
    assert plain.served_model_name == "m" and plain.cuda_graph_max_bs == plain.max_running_requests
    assert plain.speculative_num_draft_tokens is None
    assert (speculative.speculative_num_steps, speculative.speculative_num_draft_tokens) == (4, 5)
    assert make(**NEXTN, speculative_num_steps=1).speculative_num_draft_tokens == 2


def test_args_are_frozen_and_mask_the_key() -> None:
    args = make(api_key="secret")
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.port = 1
    assert "secret" not in str(args.to_dict())


@dataclass(frozen=True)
class Refused:
    """Arguments that cannot be, and what the message must name."""

    named: tuple[str, ...]
    values: dict[str, Any]
    precompute: bool = field(default=True)


REFUSED = [
    Refused(("--model-path",), {"model_path": ""}),
    Refused(("--device", "tpu"), {"device": "tpu"}),
    Refused(("--dtype", "float8"), {"dtype": "float8"}),
    Refused(("--port", "70000"), {"port": 70000}),
    Refused(("--api-key",), {"api_key": ""}),
    Refused(("--page-size", "48"), {"page_size": 48}),
    Refused(("--page-size", "512"), {"page_size": 512}),
    Refused(("--page-size", "0"), {"page_size": 0}),
    Refused(("--max-total-tokens 63", "--page-size 64"), {"max_total_tokens": 63}),
    Refused(("--mem-fraction-static", "1.5"), {"mem_fraction_static": 1.5}),
    Refused(("--max-running-requests", "0"), {"max_running_requests": 0}),
    Refused(("--cuda-graph-max-bs", "0"), {"cuda_graph_max_bs": 0}),
    Refused(("--chunked-prefill-size", "0"), {"chunked_prefill_size": 0}),
    *(
        Refused(("--prefill-burst", "-1 (no limit)", f"got {burst}"), {"prefill_burst": burst})
        for burst in (-2.0, math.inf, math.nan)
    ),
    Refused(("--context-length", "-1"), {"context_length": -1}),
    Refused(("--random-seed", "-1"), {"random_seed": -1}),
    Refused(("--attention-backend fa3", "--nsa-decode-backend"), {"attention_backend": "fa3"}),
    Refused(("--page-size", "an int", "'64'"), {"page_size": "64"}),
    Refused(("--port", "an int", "True"), {"port": True}),
    Refused(("--host", "a str", "None"), {"host": None}),
    Refused(("--tp-size 8", "plugin"), {"tp_size": 8}),
    Refused(("--enable-dp-attention", "plugin"), {"enable_dp_attention": True}),
    Refused(("--base-gpu-id 1", "CUDA_VISIBLE_DEVICES"), {"base_gpu_id": 1}),
    Refused(("--quantization fp8", "SGLang"), {"quantization": "fp8"}),
    Refused(("--speculative-algorithm EAGLE3", "NEXTN"), {"speculative_algorithm": "EAGLE3"}),
    Refused(("--speculative-draft-model-path d", "--model-path m"), {"speculative_draft_model_path": "d"}),
    Refused(("--kv-cache-dtype", "fp8_e5m2", "fp8_e4m3"), {"kv_cache_dtype": "fp8_e5m2"}),
    Refused(("--kv-cache-dtype fp8_e4m3", "--device cuda"), {"kv_cache_dtype": "fp8_e4m3"}),
    Refused(
        ("--kv-cache-dtype bf16", "--nsa-prefill-backend flashmla_kv"),
        {"device": "cuda", "kv_cache_dtype": "bf16", "nsa_prefill_backend": "flashmla_kv"},
    ),
    Refused(
        ("--kv-cache-dtype fp8_e4m3", "--nsa-decode-backend flashmla_sparse"),
        {"device": "cuda", "kv_cache_dtype": "fp8_e4m3", "nsa_decode_backend": "flashmla_sparse"},
    ),
    Refused(("--nsa-decode-backend triton", "--device cpu"), {"nsa_decode_backend": "triton"}),
    Refused(("--nsa-prefill-backend flashmla_kv", "--device cpu"), {"nsa_prefill_backend": "flashmla_kv"}),
    Refused(("--sampling-backend flashinfer", "--device cpu"), {"sampling_backend": "flashinfer"}),
    *(
        Refused(("--nsa-metadata-copy", copy), NEXTN | {"nsa_metadata_copy": copy})
        for copy in ("foreach", "streams", "cat", "triton")  # the benchmark's alone
    ),
    Refused(("--speculative-num-steps 3", "--speculative-algorithm"), {"speculative_num_steps": 3}),
    Refused(
        ("--speculative-num-draft-tokens 4", "--speculative-algorithm"), {"speculative_num_draft_tokens": 4}
    ),
    Refused(("--speculative-eagle-topk 2",), NEXTN | {"speculative_eagle_topk": 2}),
    Refused(("--speculative-num-steps", "0"), NEXTN | {"speculative_num_steps": 0}),
    Refused(
        ("--speculative-num-draft-tokens 8", "--speculative-num-steps 3"),
        NEXTN | {"speculative_num_steps": 3, "speculative_num_draft_tokens": 8},
    ),
    Refused(
        ("--nsa-metadata-layout shared", PRECOMPUTE.name), NEXTN | {"nsa_metadata_layout": "shared"}, False
    ),
    Refused(("--nsa-metadata-copy fused", PRECOMPUTE.name), NEXTN | {"nsa_metadata_copy": "fused"}, False),
    Refused(("--nsa-metadata-layout shared", "--speculative-algorithm"), {"nsa_metadata_layout": "shared"}),
    Refused(
        ("--nsa-metadata-copy torch", "--nsa-metadata-layout shared"),
        NEXTN | {"nsa_metadata_layout": "shared", "nsa_metadata_copy": "torch"},
    ),
    *(
        Refused(
            (f"--nsa-metadata-layout {layout}", "--disable-cuda-graph"),
            NEXTN | {"nsa_metadata_layout": layout, "disable_cuda_graph": True},
        )
        for layout in ("in_graph", "indirect")
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: " ".join(c.named))
def test_impossible_arguments_name_the_flags(case: Refused) -> None:
    with PRECOMPUTE.override(case.precompute), pytest.raises(ValueError) as error:
        make(**case.values)
    for name in case.named:
        assert name in str(error.value)


@pytest.mark.parametrize("layout", ["replicate", "shared", "in_graph", "indirect"])
def test_layouts_are_accepted_with_the_flag(layout: str) -> None:
    with PRECOMPUTE.override(True):
        assert make(**NEXTN, nsa_metadata_layout=layout).nsa_metadata_layout == layout


SGLANG_COMMANDS = [
    # the launch line of DeepSeek-V3.2 on one GPU
    "--model m --tp 1 --dp 1 --trust-remote-code --attention-backend nsa --kv-cache-dtype auto "
    "--mem-fraction-static 0.85 --page-size 64 --enable-metrics --chunked-prefill-size 4096 "
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4 --cuda-graph-max-bs 32 --disable-overlap-schedule",
    "--model-path m --tokenizer-path t --load-format safetensors --attention-backend dsa --nnodes 1 "
    "--tensor-parallel-size 1 --ep-size 1 --schedule-conservativeness 0.3 --watchdog-timeout 1000000 "
    "--decode-log-interval 1 --skip-server-warmup --enable-cache-report --weight-version v2",
    "--model-path=m --speculative-algo=NEXTN --speculative-draft-model-path=m --dsa-decode-backend=torch",
]


@pytest.mark.parametrize("command", SGLANG_COMMANDS)
def test_command_lines_of_sglang_start(command: str) -> None:
    args = ServerArgs.from_cli([*command.split(), "--device", "cpu"])
    assert args.model_path == "m" and args.load_format == "auto"
    assert args.tokenizer_path == ("t" if "--tokenizer-path" in command else "m")


def test_fp8_cache_chooses_its_reader() -> None:
    args = make(device="cuda", kv_cache_dtype="fp8_e4m3")
    assert (args.nsa_prefill_backend, args.nsa_decode_backend) == ("flashmla_kv", "flashmla_kv")
    assert make(device="cuda", nsa_decode_backend="flashmla_kv", nsa_prefill_backend="flashmla_kv")


def another(value: Any) -> Any:
    return "x" if value is None else {bool: True, float: 0.5, int: 7, str: "x"}[type(value)]


@pytest.mark.parametrize("f", dataclasses.fields(SGLangArgs), ids=lambda f: f.name)
def test_flags_of_sglang_take_their_values_and_no_others(f: dataclasses.Field[Any]) -> None:
    """A flag with choices says what to do for any other value; without choices it takes every value."""
    choices, instead = f.metadata["choices"], f.metadata["instead"]
    assert make(**{f.name: f.default}) == make()
    if choices is None:
        other = another(f.default)
        assert getattr(make(**{f.name: other}), f.name) == other
        return
    for value in choices:
        make(**{f.name: value})
    with pytest.raises(ValueError) as error:
        make(**{f.name: another(choices[0] if choices else None)})
    assert flag(f.name) in str(error.value) and instead in str(error.value)


@pytest.mark.parametrize(
    "argv,said",
    [
        (["--speculativ-num-steps", "3"], "--speculativ-num-steps: did you mean --speculative-num-steps"),
        (["--model-pth=x"], "--model-pth: did you mean --model-path"),
        (["--zzz"], "unknown flag --zzz"),
        (["stray"], "'stray'"),
        ([], "--model-path is required"),
        (["--model-path", "m", "--tp", "2"], "plugin"),
        (["--model-path", "m", "--port", "http"], "--port"),
    ],
)
def test_wrong_command_lines_get_one_helpful_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        ServerArgs.from_cli(argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err.splitlines()[-1] and len(err.splitlines()) == 2


def test_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ServerArgs.from_cli(["--help"])
    text = capsys.readouterr().out
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[1:4] == ["what is served, and where:", "how the model runs:", "memory and batching:"]
    assert text.index("--nsa-metadata-layout") < text.index("--tp-size") < text.index("--enable-lora")


def test_names_of_the_model() -> None:
    assert make(model_path="a/b/").model_names == ("a/b/", "b")
    assert make(model_path="a/b", served_model_name="c").model_names == ("c", "a/b", "b")


def test_command_line_errors_end_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        ServerArgs.from_cli(["--model-path", "m", "--device", "cpu", "--speculative-num-steps", "3"])
    assert end.value.code == 2
    assert "--speculative-algorithm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,value", [("1", True), ("true", True), ("ON", True), ("0", False), ("no", False)]
)
def test_bool_words(text: str, value: bool) -> None:
    assert parse_bool(text) is value


@pytest.mark.parametrize("text", ["2", "maybe", "tru", "-1"])
def test_flag_that_does_not_parse_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SGLANG_TEST_FLAG", text)
    test_flag = EnvFlag("SGLANG_TEST_FLAG", False, parse_bool, "")
    with pytest.raises(ValueError, match=f"SGLANG_TEST_FLAG='{text}'"):
        test_flag.get()


def test_flag_that_does_not_parse_stops_the_start(tmp_path: Path) -> None:
    argv = ["--model-path", "m", "--device", "cpu"]
    env = os.environ | {"SGLANG_NSA_VERIFY_METADATA": "perhaps"}
    process = ForkedProcess(run_server, argv, {}, env=env, log=tmp_path / "log")
    assert process.wait(180) != 0
    assert "SGLANG_NSA_VERIFY_METADATA='perhaps'" in (tmp_path / "log").read_text()


def test_ports_are_unique_and_removed() -> None:
    first, second = PortArgs.init_new(), PortArgs.init_new()
    names = {first.tokenizer_ipc_name, first.scheduler_input_ipc_name, second.tokenizer_ipc_name}
    assert len(names) == 3
    for ports in (first, second):
        ports.remove()
        assert not os.path.exists(os.path.dirname(ports.tokenizer_ipc_name.removeprefix("ipc://")))
