"""`python -m sglang.launch_server --model-path DIR`: a server in two processes."""

from __future__ import annotations

import signal
import sys

from sglang.srt.server_args import ServerArgs


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to clean up while modules are imported
    args = ServerArgs.from_cli()
    from sglang.srt.entrypoints.http_process import launch_server  # slow to import: after the arguments

    return launch_server(args)


if __name__ == "__main__":
    sys.exit(main())
