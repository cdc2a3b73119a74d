"""The scheduler's life in a process of its own, and what it loads for it."""

from __future__ import annotations

import logging
import sys

from sglang.srt.garbage_collection import freeze_gc
from sglang.srt.managers.heartbeat import HeartbeatSender
from sglang.srt.managers.io_struct import SchedulerFailed
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_link import ParentDied, ZmqLink
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def run_scheduler_process(server_args: ServerArgs, port_args: PortArgs) -> None:
    """Loads the model, says that it is ready, and serves until the parent process ends this one or dies.

    Where it cannot start or a step fails, it says why (`SchedulerFailed`) and exits with status 1.
    """
    from sglang.srt.managers.worker_factory import create_worker  # imports the models

    link, scheduler = ZmqLink(port_args), None
    try:
        worker = create_worker(server_args)  # first: it says best what is wrong with the model's files
        scheduler = Scheduler(server_args, worker, link, load_tokenizer(server_args.tokenizer_path))
        freeze_gc()
        HeartbeatSender(port_args).start()
        link.send(scheduler.ready())
        scheduler.run()
    except ParentDied as error:
        logger.error("the scheduler ends: %s", error)
    except Exception as error:
        # Before the first request these say what a user gave that cannot be; anything else is a bug.
        expected = scheduler is None and isinstance(error, (ValueError, OSError))
        if not expected:
            logger.exception("the scheduler ends")
        link.send(SchedulerFailed(str(error) if expected else f"{type(error).__name__}: {error}"))
    finally:
        link.close()
    sys.exit(1)
