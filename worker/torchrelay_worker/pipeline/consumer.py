"""The Celery worker: messages of the served models' queues, pulled while there is room, handed to the intake.

A real one: Celery's `inspect` and Flower see it, SIGTERM shuts it down warmly. Not here: what is done with a chunk.
"""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import structlog
from celery import Celery, bootsteps, signals
from celery.exceptions import Reject
from kombu.utils.scheduling import round_robin_cycle

from torchrelay import messages
from torchrelay_storage import faults
from torchrelay_storage.errors import InvalidInput

log = structlog.get_logger("torchrelay.consumer")

# Threads that wait for their chunk's claim: so many messages may be claimed by one statement.
CLAIMED_TOGETHER = 8
# For which Redis is asked for a message while some model has no room: what waits for that one is not among what is
# asked for, should there be room again meanwhile.
SHORT_SECONDS = 0.05


class Takes(Protocol):
    """What the consumer needs of an Intake."""

    def offer(self, model: str, chunk: int) -> bool: ...
    def has_room(self, model: str) -> bool: ...


class Consumer:
    """One Celery worker in this process. `run` blocks in the main thread until a signal ends it."""

    def __init__(
        self,
        app: Celery,
        intake: Takes,
        served: Callable[[], Mapping[str, int]],
        *,
        name: str,
        shutting_down: Callable[[], object],
    ) -> None:
        self._app = app
        self._intake = intake
        self._served = served
        self._name = name
        self._shutting_down = shutting_down
        self._lock = threading.Lock()
        self._celery_consumer: Any = None
        self._define_task()
        self._gate()
        self._follow_consumer()

    def run(self) -> None:
        """Consume until SIGTERM. Returns after the warm shutdown."""

        def on_shutting_down(**_: Any) -> None:
            # In a signal handler: no lock may be waited for here.
            threading.Thread(target=self._shutting_down, name="stopping", daemon=True).start()

        signals.worker_shutting_down.connect(on_shutting_down, weak=False)
        queues = [messages.queue_name(model) for model in self._served()]
        with warnings.catch_warnings():
            # Root in a container is usual, and only JSON is accepted, which is what that warning is about.
            warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
            worker = self._app.Worker(
                hostname=self._name,
                queues=queues or [self._app.conf.task_default_queue],
                pool="threads",
                concurrency=CLAIMED_TOGETHER,
                loglevel="WARNING",
                quiet=True,
                without_gossip=True,
                without_mingle=True,
                without_heartbeat=True,
                redirect_stdouts=False,
            )
        worker.start()

    # --- called by the pipeline ---------------------------------------------------------------------------

    def opened(self) -> None:
        """There is room again: let the loop look, should it have stopped to pull."""
        consumer = self._celery_consumer
        if consumer is not None and consumer.hub is not None:
            consumer.hub.call_soon(_nothing)

    def rebuild(self) -> None:
        """Let Celery connect and consume anew, as after a lost connection."""
        consumer = self._celery_consumer
        if consumer is not None and consumer.hub is not None:
            consumer.hub.call_soon(_break_off)

    def added(self, model: str) -> None:
        """Consume the queue of a model that was registered just now."""
        consumer = self._celery_consumer
        if consumer is not None:  # else it is added once the connection is there
            consumer.call_soon(self._add_missing, consumer)

    # --- Celery's side ------------------------------------------------------------------------------------

    def _define_task(self) -> None:
        intake = self._intake
        # A message that goes back to the others is no news; Celery would show a traceback for each.
        logging.getLogger("celery.app.trace").addFilter(_is_no_reject)

        @self._app.task(name=messages.TASK, bind=True, acks_late=True, ignore_result=True)
        def run_chunk(task: Any, *args: Any) -> None:
            try:
                chunk = messages.decode(args)
            except InvalidInput as error:
                log.warning("message_dropped", reason=str(error))
                return
            faults.reach("popped")
            queue = (task.request.delivery_info or {}).get("routing_key") or ""
            model = messages.model_of(queue)
            # Acknowledged once claimed; who ends before leaves it to the others.
            if not intake.offer(model or "", chunk):
                raise Reject("for another worker", requeue=True)
            faults.reach("acknowledging")

    def _gate(self) -> None:
        intake = self._intake

        class WithRoom(round_robin_cycle):
            """The queues that are asked for the next message: those of models that have room, in turn.

            Kombu asks for it before each BRPOP. Where it is empty nothing is pulled and nothing is held, neither here
            nor in the socket, and the queue of a model without room holds up no other.
            """

            def consume(self, n: int) -> list[str]:
                return [q for q in self.items[:n] if intake.has_room(messages.model_of(q) or "")]

        options = dict(self._app.conf.broker_transport_options)
        options["queue_order_strategy"] = WithRoom
        self._app.conf.broker_transport_options = options

    def _follow_consumer(self) -> None:
        outer = self

        class Follow(bootsteps.StartStopStep):
            """Knows Celery's consumer while it is connected; started anew at each reconnect."""

            requires = {"celery.worker.consumer.tasks:Tasks"}

            def start(self, parent: Any) -> None:
                # Celery would start itself anew; here the supervisor decides about that.
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                # Three events a message cost more than all else of it; who watches asks for them, as Flower does.
                if parent.event_dispatcher is not None and not parent.event_dispatcher.groups:
                    parent.event_dispatcher.groups = {"worker"}
                outer._celery_consumer = parent
                outer._ask_briefly(parent.task_consumer.channel)
                outer._add_missing(parent)

            def stop(self, parent: Any) -> None:
                outer._celery_consumer = None

        self._app.steps["consumer"].add(Follow)

    def _ask_briefly(self, channel: Any) -> None:
        """Have Redis answer soon where it is not asked for every model."""
        start = channel._brpop_start

        def brpop_start(timeout: float | None = None) -> None:
            is_full = any(not self._intake.has_room(model) for model in self._served())
            start(SHORT_SECONDS if is_full else timeout)

        channel._brpop_start = brpop_start

    def _add_missing(self, consumer: Any) -> None:
        if consumer.task_consumer is None:
            return
        for model in self._served():
            queue = messages.queue_name(model)
            if not consumer.task_consumer.consuming_from(queue):
                consumer.add_task_queue(queue)


def _is_no_reject(record: logging.LogRecord) -> bool:
    context = getattr(record, "data", None)
    return not (isinstance(context, dict) and context.get("description") == "rejected")


def _nothing() -> None:
    pass


def _break_off() -> None:
    raise ConnectionResetError("the consumer was silent while messages waited")
