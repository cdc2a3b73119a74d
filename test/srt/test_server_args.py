"""The arguments: what the command line gives, what is derived, and every combination that is refused."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from sglang.srt.environ import EnvFlag, envs, parse_bool
from sglang.srt.server_args import PortArgs, ServerArgs, flag

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
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
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
    Refused(("--context-length", "-1"), {"context_length": -1}),
    Refused(("--random-seed", "-1"), {"random_seed": -1}),
    Refused(("--attention-backend", "fa3"), {"attention_backend": "fa3"}),
    Refused(("--nsa-decode-backend triton", "--device cpu"), {"nsa_decode_backend": "triton"}),
    Refused(("--nsa-prefill-backend flashmla_kv", "--device cpu"), {"nsa_prefill_backend": "flashmla_kv"}),
    Refused(("--sampling-backend flashinfer", "--device cpu"), {"sampling_backend": "flashinfer"}),
    Refused(("--nsa-metadata-copy streams", "--device cpu"), NEXTN | {"nsa_metadata_copy": "streams"}),
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
    Refused(
        ("--nsa-metadata-layout in_graph", "--disable-cuda-graph"),
        NEXTN | {"nsa_metadata_layout": "in_graph", "disable_cuda_graph": True},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: " ".join(c.named))
def test_impossible_arguments_name_the_flags(case: Refused) -> None:
    with PRECOMPUTE.override(case.precompute), pytest.raises(ValueError) as error:
        make(**case.values)
    for name in case.named:
        assert name in str(error.value)


@pytest.mark.parametrize("layout", ["replicate", "shared", "in_graph"])
def test_layouts_are_accepted_with_the_flag(layout: str) -> None:
    with PRECOMPUTE.override(True):
        assert make(**NEXTN, nsa_metadata_layout=layout).nsa_metadata_layout == layout


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


def test_flag_that_does_not_parse_stops_the_start() -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", "m", "--device", "cpu"]
    env = os.environ | {"SGLANG_NSA_VERIFY_METADATA": "perhaps"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "SGLANG_NSA_VERIFY_METADATA='perhaps'" in result.stderr


def test_ports_are_unique_and_removed() -> None:
    first, second = PortArgs.init_new(), PortArgs.init_new()
    names = {first.tokenizer_ipc_name, first.scheduler_input_ipc_name, second.tokenizer_ipc_name}
    assert len(names) == 3
    for ports in (first, second):
        ports.remove()
        assert not os.path.exists(os.path.dirname(ports.tokenizer_ipc_name.removeprefix("ipc://")))
