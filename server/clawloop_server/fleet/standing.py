"""What the dispatcher knows of one device since the hub started, and when it is to be asked what. Pure."""

from clawloop_shared.messages import ADAPTER, LEARN, SECURE, STATUS, UPLOAD, ItemReceipt

_NEVER = float("inf")


class Standing:
    """One device. Times are of the dispatcher's clock."""

    def __init__(self, device_id: str, now_s: float) -> None:
        self.device_id = device_id
        self.under_way: dict[str, float] = {}
        """until when an answer to each kind of question is waited for"""
        self.version: int | None = None
        """the adapter that it uses; None: it was not asked yet"""
        self.refused: dict[int, float] = {}
        """until when it is not offered a version that it did not take"""
        self.offered = 0
        self.log_size = 0
        """how many entries the log of adapters had when it saw it last"""
        self.status_due_s = self.upload_due_s = now_s
        self.receipts: list[ItemReceipt] = []
        self.told = 0
        """how many of the receipts are in the question that is under way"""
        self.since = ""
        """when it connected last, in Flower's words"""
        self.failures = 0
        self.asked_due_s: dict[str, float] = {}
        """when it may be asked for these kinds again"""

    def lost(self) -> None:
        """What is under way will not be answered: the bridge that asked it is gone, or the device has begun anew."""
        if STATUS in self.under_way:
            self.status_due_s = -_NEVER
        self.under_way.clear()

    def may_ask(self, kind: str, now_s: float) -> bool:
        """Whether this kind of question is due now."""
        return self._when(kind) <= now_s

    def awaits(self, now_s: float) -> bool:
        """Whether an answer of it is waited for."""
        return any(until_s > now_s for until_s in self.under_way.values())

    def turn_s(self) -> float:
        """When it is next to be asked how it is, or for its items."""
        return min(self._when(STATUS), self._when(UPLOAD))

    def offer_s(self, released: int) -> float:
        """When it is next to be offered that version; inf if it has it."""
        if self.version is None or released <= self.version:
            return _NEVER
        return max(self.refused.get(released, -_NEVER), self.under_way.get(ADAPTER, -_NEVER))

    def task_s(self) -> float:
        """When it is next to be looked up whether it has a task, or a part in a sum."""
        return min(self._when(LEARN), self._when(SECURE))

    def _when(self, kind: str) -> float:
        """When this kind of question is due; only a device that said how it is is asked anything else."""
        if kind == STATUS:
            unheard = self.version is None and not self.failures  # nothing else is asked of it until it has answered
            due_s = -_NEVER if unheard else self.status_due_s
        elif self.version is None:
            return _NEVER
        elif kind == UPLOAD:
            due_s = self.upload_due_s
        else:
            due_s = self.asked_due_s.get(kind, -_NEVER)
        return max(due_s, self.under_way.get(kind, -_NEVER))
