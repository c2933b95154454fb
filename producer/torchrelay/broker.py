"""The Celery app and the Redis behind it: sending chunks, counting how full a queue is, telling that something ended.

Every failure of Redis leaves here as Unreachable. Not here: which chunks to send, and when (`announcer`).
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from torchrelay import messages
from torchrelay.settings import Settings, safe_url
from torchrelay_storage import ids
from torchrelay_storage.errors import Unreachable
from torchrelay_storage.ids import Kind

if TYPE_CHECKING:
    import redis
    from celery import Celery

# A producer gives up on a silent Redis within a second; a worker waits longer, since giving up costs it a reconnect.
PRODUCER_TIMEOUT = 0.7
WORKER_TIMEOUT = 5.0

# Kombu's own, between a queue's name and a priority's step. Another one would be prettier, and hide the worker from
# Flower and from a plain `celery inspect`: it also stands in the bindings that their replies come by.
SEPARATOR = "\x06\x16"

QUIET = 1.0  # seconds in which a Redis that did not answer is told nothing
PUBLISH_BATCH = 100  # messages in one round trip: 0.025 ms each instead of 0.25


def make_app(settings: Settings, *, worker: bool = False) -> Celery:
    """Return the Celery app: JSON only, no results, ten real priorities, and connections that notice a silent Redis."""
    from celery import Celery

    app = Celery("torchrelay", broker=settings.broker_url, set_as_current=False)
    transport: dict[str, Any] = {
        "socket_timeout": WORKER_TIMEOUT if worker else PRODUCER_TIMEOUT,
        "socket_connect_timeout": 3.0 if worker else PRODUCER_TIMEOUT,
        "socket_keepalive": True,
        "health_check_interval": 5,
        # The message is acknowledged once its chunk is claimed, so this guards milliseconds, not the work.
        "visibility_timeout": settings.visibility_timeout,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        # `priority` would let one model's urgent jobs starve every other model.
        "queue_order_strategy": "round_robin",
        "priority_steps": list(messages.PRIORITIES),
    }
    if not worker:
        transport |= {"max_retries": 0}  # kombu would go on for ever; the announcer's thread tries again itself
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_default_queue=messages.queue_name("unused"),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        enable_utc=True,
        broker_transport_options=transport,
    )
    return app


def redis_url(broker_url: str) -> str:
    """Return the URL as redis-py reads it: Celery says redis+socket:///path?virtual_host=1, redis-py unix:///path?db=1."""
    parts = urlsplit(broker_url)
    if parts.scheme != "redis+socket":
        return broker_url
    query = parse_qs(parts.query)
    database = (query.get("virtual_host") or ["0"])[0].strip("/")
    return f"unix://{parts.netloc}{quote(parts.path)}?{urlencode({'db': database})}"


def connect(settings: Settings, *, timeout: float | None = PRODUCER_TIMEOUT, **options: Any) -> redis.Redis:
    """Return a redis-py client that tries once. `timeout` is seconds for an answer, None for no limit."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    url = redis_url(settings.broker_url)
    if not url.startswith("unix://"):
        options |= {"socket_connect_timeout": PRODUCER_TIMEOUT, "socket_keepalive": True}
    options = {"socket_timeout": timeout, "health_check_interval": 5, "retry": Retry(NoBackoff(), 0)} | options
    return redis.Redis.from_url(url, **options)


class Broker:
    """Redis, as the producer's side needs it. Connects at the first use; thread-safe; a forked child connects anew."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.safe_url = safe_url(settings.broker_url)
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._app: Celery | None = None
        self._redis: redis.Redis | None = None
        self._connection: Any = None
        self._producer: Any = None
        self._quiet_until = 0.0

    @property
    def app(self) -> Celery:
        """The Celery app of the producer's side."""
        with self._lock:
            if self._app is None:
                self._app = make_app(self.settings)
            return self._app

    @property
    def redis(self) -> redis.Redis:
        """A redis-py client with a producer's timeouts."""
        with self._lock:
            if self._redis is None:
                self._redis = connect(self.settings)
            return self._redis

    def send(self, chunks: Iterable[tuple[str, int, int]]) -> int:
        """Send (queue, priority, chunk id) messages in their order and return how many.

        Raises:
            Unreachable: Redis did not take them; some may have arrived all the same, which is harmless.
        """
        sent = 0
        with self._lock, self._named_errors():
            try:
                if self._producer is None:
                    self._connection = self.app.connection_for_write()
                    self._producer = self._connection.Producer(serializer="json")
                create = self.app.amqp.create_task_message
                with self._producer.batch(PUBLISH_BATCH):
                    for queue, priority, chunk in chunks:
                        name = ids.show(Kind.CHUNK, chunk)
                        task = create(name, messages.TASK, messages.encode(chunk), {}, ignore_result=True)
                        # The default exchange needs no binding in Redis, which a FLUSHALL would take away.
                        self._producer.publish(
                            task.body,
                            exchange="",
                            routing_key=queue,
                            priority=messages.redis_priority(priority),
                            headers=task.headers,
                            **task.properties,
                        )
                        sent += 1
            except BaseException:
                self._drop()
                raise
        return sent

    def depths(self, queue: str) -> dict[int, int]:
        """Return how many messages of each priority (9 the most urgent) wait in a queue. Raises Unreachable."""
        with self._named_errors():
            pipeline = self.redis.pipeline(transaction=False)
            for priority in messages.PRIORITIES:
                pipeline.llen(_key(queue, priority))
            return dict(zip(messages.PRIORITIES, (int(n) for n in pipeline.execute()), strict=True))

    def waiting(self, queue: str) -> set[int]:
        """Return the ids of the chunks whose messages wait in a queue. Raises Unreachable."""
        with self._named_errors():
            pipeline = self.redis.pipeline(transaction=False)
            for priority in messages.PRIORITIES:
                pipeline.lrange(_key(queue, priority), 0, -1)
            found = (messages.read_chunk(data) for part in pipeline.execute() for data in part)
            return {chunk for chunk in found if chunk is not None}

    def is_up(self) -> bool:
        """Whether Redis answers now."""
        try:
            with self._named_errors():
                return bool(self.redis.ping())
        except Unreachable:
            return False

    def publish_ended(self, chunks: Iterable[int] = (), batches: Iterable[int] = ()) -> bool:
        """Wake who waits for jobs of these chunks or for these batches; False where Redis did not take it.

        Never raises: what ended is in SQL, and a waiter that is not woken looks there itself a moment later. A Redis
        that was silent is not asked again for QUIET seconds, so that it does not hold up who records results.
        """
        if time.monotonic() < self._quiet_until:
            return False
        try:
            with self._named_errors():
                for body in messages.encode_ended(chunks, batches):
                    self.redis.publish(messages.CHANNEL, body)
        except Unreachable:
            self._quiet_until = time.monotonic() + QUIET
            return False
        return True

    def close(self) -> None:
        """Close the connections. The next use opens them again."""
        with self._lock:
            self._drop()
            if self._redis is not None:
                self._redis.close()
                self._redis = None

    def _drop(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            with suppress(Exception):
                connection.collapse()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        import redis
        from kombu.exceptions import KombuError

        try:
            yield
        except (redis.RedisError, KombuError, OSError) as error:
            cause = error.__cause__ if isinstance(error, KombuError) and error.__cause__ else error
            raise Unreachable(f"Redis at {self.safe_url} does not answer: {_first_line(cause)}") from error


def _key(queue: str, priority: int) -> str:
    step = messages.redis_priority(priority)
    return f"{queue}{SEPARATOR}{step}" if step else queue


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_all: weakref.WeakSet[Broker] = weakref.WeakSet()


def _forget() -> None:
    # A forked child must not speak on its parent's sockets, nor wait for a lock that a parent's thread held.
    for broker in _all:
        broker._reset()


os.register_at_fork(after_in_child=_forget)
