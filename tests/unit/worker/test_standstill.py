"""What stands still is told from what rests, from what is busy, and from a process that was stopped."""

from __future__ import annotations

from torchrelay_worker.pipeline.standstill import CLAIM_SECONDS, STANDSTILL_SECONDS, Standstill
from worker_fakes import Clock


class Thread:
    """A thread that comes round when told."""

    def __init__(self) -> None:
        self.turns = 0
        self.has_waiting = False


class Rig:
    def __init__(self) -> None:
        self.clock = Clock()
        self.device, self.intake = Thread(), Thread()
        self.standstill = Standstill(self.device, self.intake, self.clock)

    def pass_(self, seconds: float, step: float = 0.5) -> str | None:
        reason = None
        for _ in range(int(seconds / step)):
            self.clock.now += step
            reason = self.standstill.reason()
        return reason


def test_a_device_that_does_not_come_round_while_inputs_wait() -> None:
    rig = Rig()
    rig.device.has_waiting = True
    assert rig.pass_(STANDSTILL_SECONDS - 1) is None
    reason = rig.pass_(2)
    assert reason is not None
    assert "device" in reason
    rig.device.turns += 1
    assert rig.pass_(1) is None


def test_rest_is_no_standstill() -> None:
    rig = Rig()
    assert rig.pass_(10 * STANDSTILL_SECONDS) is None
    for _ in range(100):
        rig.device.has_waiting = True
        rig.device.turns += 1
        assert rig.pass_(1) is None


def test_a_process_that_was_stopped_has_not_stood_still() -> None:
    rig = Rig()
    rig.device.has_waiting = True
    rig.pass_(1)
    rig.clock.now += 3600
    assert rig.pass_(1) is None


def test_claims_have_longer() -> None:
    rig = Rig()
    rig.intake.has_waiting = True
    assert rig.pass_(CLAIM_SECONDS - 1) is None
    assert "claiming" in (rig.pass_(2) or "")
