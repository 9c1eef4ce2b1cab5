"""The thread that drafts: it alone touches the drafter, and never the event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from treecast.drafting.merge import MergedDrafter
from treecast.errors import TreecastError
from treecast.tree import TokenTree

from .metrics import SpeculatorMetrics
from .orders import Advance, Close, Grown, Lost, Open, Order, Result

log = structlog.get_logger()

_FORGETTING = 0.99


@dataclass(slots=True)
class _Growing:
    """A session as the thread sees it.

    Attributes:
        tokens_per_s: what its time is worth; 0 is nothing.
        owes_tree: a tree for this length was asked for and is not, or not fully, delivered.
        may_run_ahead: there may be more to compute beyond the tree delivered.
    """

    length: int
    max_nodes: int
    tokens_per_s: float
    owes_tree: bool = True
    may_run_ahead: bool = False


class Grower:
    """Drafts for all sessions that have work, as one batch, over and over.

    Orders that arrive during a draft are applied before the next. The tree of that draft is
    delivered all the same, though its base is superseded: the verifier re-roots it along what it
    committed since, and what survives is there a whole draft earlier than its successor.
    """

    def __init__(
        self,
        drafter: MergedDrafter,
        deliver: Callable[[Sequence[Result]], None],
        metrics: SpeculatorMetrics,
        thread: ThreadPoolExecutor,
        run_ahead_nodes: int = 0,
    ) -> None:
        """Prepare to draft.

        Args:
            thread: the one that the drafter's engine was loaded on.
            deliver: called on the drafting thread with each batch of results; must not block.
            run_ahead_nodes: size to which trees go on growing while there is nothing else to do; 0
                leaves the thread asleep between orders.
        """
        self._drafter = drafter
        self._deliver = deliver
        self._metrics = metrics
        self._run_ahead_nodes = run_ahead_nodes
        self._growing: dict[int, _Growing] = {}
        self._orders: list[Order] = []
        self._chores: list[tuple[Callable[[], None], Future[None]]] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._working = False
        self._thread = thread
        self._run_ended: Future[None] | None = None
        self.num_drafts = 0
        self.slowest_draft_s = 0.0
        self._began: float | None = None

    @property
    def busy(self) -> bool:
        """Whether the thread has anything left to do."""
        with self._changed:
            return self._working or bool(self._orders) or self._has_work()

    @property
    def draft_age_s(self) -> float:
        """For how long the draft under way has run; 0 when idle."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def start(self) -> None:
        """Begin drafting on the thread. Once."""
        self._run_ended = self._thread.submit(self._run)

    def submit(self, orders: Sequence[Order]) -> None:
        """Hand over orders; any thread, never blocks for longer than a list append."""
        with self._changed:
            self._orders.extend(orders)
            self._changed.notify()

    def between_drafts(self, work: Callable[[], None]) -> Future[None]:
        """Have something done to the drafter; any thread, never blocks.

        Returns:
            Done, or failed as `work` did, once the draft under way has ended and so has that. It
            can be cancelled until `work` begins.
        """
        done: Future[None] = Future()
        with self._changed:
            self._chores.append((work, done))
            self._changed.notify()
        return done

    def close(self) -> None:
        """Stop after the draft under way, and wait for that."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._run_ended is not None:
            self._run_ended.result()

    def _run(self) -> None:
        while (orders := self._next_orders()) is not None:
            self._do_chores()
            lost = [result for order in orders if (result := self._apply(order))]
            self._send(lost + self._draft())
            if not any(growing.owes_tree for growing in self._growing.values()):
                self._run_ahead()

    def _do_chores(self) -> None:
        with self._changed:
            chores, self._chores = self._chores, []
        for work, done in chores:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                work()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _next_orders(self) -> list[Order] | None:
        """Wait until there is something to do; None to stop."""
        with self._changed:
            self._working = False
            self._changed.wait_for(
                lambda: self._stopping or self._orders or self._chores or self._has_work()
            )
            self._working = True
            orders, self._orders = self._orders, []
            return None if self._stopping else orders

    def _has_work(self) -> bool:
        return any(each.owes_tree or each.may_run_ahead for each in self._growing.values())

    def _send(self, results: Sequence[Result]) -> None:
        if results:
            self._deliver(results)

    def _apply(self, order: Order) -> Lost | None:
        try:
            match order:
                case Open():
                    self._drafter.open(order.session, order.request)
                    length = len(order.request.tokens)
                    growing = _Growing(length, order.max_nodes, order.tokens_per_s)
                    self._growing[order.session] = growing
                case Advance():
                    self._advance(order)
                case Close():
                    self._forget(order.session)
        except Exception as error:
            return self._lose(order.session, error)
        return None

    def _advance(self, order: Advance) -> None:
        growing = self._growing.get(order.session)
        if growing is None:
            return
        self._drafter.commit(order.session, order.tokens)
        growing.length += len(order.tokens)
        growing.max_nodes, growing.tokens_per_s = order.max_nodes, order.tokens_per_s
        growing.owes_tree = True
        if self._run_ahead_nodes:
            outcome = "hit" if self._drafter.foresaw(order.session) else "miss"
            self._metrics.run_ahead.labels(outcome).inc()

    def _forget(self, session: int) -> None:
        self._growing.pop(session, None)
        self._drafter.close(session)

    def _lose(self, session: int, error: Exception) -> Lost:
        """Give a session up, whatever went wrong; the others go on."""
        self._forget(session)
        if isinstance(error, TreecastError):
            return Lost(session, error)
        log.error("draft.failed", session=session, exc_info=error)
        return Lost(session, TreecastError("drafting failed"))

    def _draft(self) -> list[Result]:
        """One tree for each session that is owed one; long prompts take several rounds."""
        for growing in self._growing.values():
            growing.owes_tree = growing.owes_tree and growing.max_nodes > 0
        budgets = {
            session: growing.max_nodes
            for session, growing in self._growing.items()
            if growing.owes_tree
        }
        if not budgets:
            return []
        tokens_per_s = sum(self._growing[session].tokens_per_s for session in budgets)
        trees, taken_s = self._timed(lambda: self._drafter.draft(budgets, tokens_per_s))
        drafting_us = round(1e6 * taken_s)
        grown = [self._grown(session, tree, drafting_us) for session, tree in trees.items()]
        return self._take_lost() + grown

    def _take_lost(self) -> list[Result]:
        """Give up the sessions that every drafter failed at."""
        return [self._lose(session, why) for session, why in self._drafter.take_lost().items()]

    def _grown(self, session: int, tree: TokenTree, drafting_us: int) -> Grown:
        growing = self._growing[session]
        growing.owes_tree = self._drafter.is_behind(session)
        growing.may_run_ahead = self._run_ahead_nodes > 0
        return Grown(session, growing.length, tree, drafting_us)

    def _run_ahead(self) -> None:
        """A little more, so that orders never wait for long."""
        budgets = {
            session: max(growing.max_nodes, self._run_ahead_nodes)
            for session, growing in self._growing.items()
            if growing.may_run_ahead and growing.max_nodes > 0
        }
        unfinished = self._drafter.run_ahead(budgets) if budgets else set()
        self._send(self._take_lost())
        for session, growing in self._growing.items():
            growing.may_run_ahead = session in unfinished

    def _timed(
        self, draft: Callable[[], dict[int, TokenTree]]
    ) -> tuple[dict[int, TokenTree], float]:
        """The trees, and the seconds that they took."""
        self._began = began = time.monotonic()
        try:
            trees = draft()
        finally:
            self._began = None
            self.num_drafts += 1
            taken_s = time.monotonic() - began
            self.slowest_draft_s = max(taken_s, _FORGETTING * self.slowest_draft_s)
        return trees, taken_s
