"""Another draft model in a speculator that goes on drafting: loaded beside the one it replaces."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ssm import SSMDrafter
from treecast.drafting.swap import SwappableDrafter
from treecast.engine.base import Engine, ModelInfo
from treecast.errors import InvalidRequest, NotServed, PermissionDenied, Unavailable
from treecast.heap import settle_heap

from .grower import Grower
from .loading import load_beside, make_model_drafter
from .metrics import SpeculatorMetrics
from .sessions import Sessions
from .settings import DrafterSpec, SpeculatorSettings

log = structlog.get_logger()


@dataclass(slots=True)
class Draft:
    """A draft model that serves now.

    Attributes:
        model: its folder, as it was given; empty for the setting `model`.
    """

    spec: DrafterSpec
    model: str
    drafter: SwappableDrafter
    engine: Engine


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What became of a reload.

    Attributes:
        moved: sessions that were asked to attach anew.
        kept: sessions under `mss`, which stay with the old draft until they end.
    """

    drafter: str
    before: ModelInfo
    after: ModelInfo
    moved: int
    kept: int


class Reloading:
    """Replaces draft models, one at a time. Event loop only.

    Trees of the old draft stay good: under `replay` a tree decides nothing about the text. Under
    `mss` it would be for us to show that the text's distribution stays what it was while the new
    draft draws by the counters that the old one has used, since they hang on session and process;
    so such a session keeps the draft that it began with until it ends.
    """

    def __init__(
        self,
        settings: SpeculatorSettings,
        drafts: Sequence[Draft],
        grower: Grower,
        sessions: Sessions,
        metrics: SpeculatorMetrics,
    ) -> None:
        self.drafts = list(drafts)
        self._settings = settings
        self._grower = grower
        self._sessions = sessions
        self._metrics = metrics
        self._reloading = False
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        for draft in self.drafts:
            metrics.show_draft(draft.spec.name, draft.engine.info)

    def close(self) -> None:
        """Take no more; does not wait for a draft that is being loaded."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def reload_all(self) -> None:
        """Read every draft's folder again, as at SIGHUP; where that fails, it is logged."""
        for draft in self.drafts:
            try:
                await self.reload(draft.spec.name, "")
            except Exception as error:
                log.error("draft.not_reloaded", drafter=draft.spec.name, exc_info=error)

    async def reload(self, drafter: str, model: str) -> Reloaded:
        """Load a draft beside the one that serves, and let it take over.

        Args:
            drafter: its name; empty for the only draft model.
            model: folder; empty for the same one again.

        Raises:
            NotServed: no such drafter.
            PermissionDenied: a folder that may not be named.
            Unavailable: another reload is under way.
            ModelError: the folder holds no draft that can be loaded.
            InvalidRequest: its vocabulary or tokenizer is another.

        In all these cases the old one goes on, and so it does where the caller leaves before the
        new one is loaded; after that, the new one takes over all the same.
        """
        draft = self._find(drafter)
        if model:
            self._check_folder(model)
        if self._reloading:
            raise Unavailable("another draft is being loaded")
        self._reloading = True
        try:
            engine = await self._load(draft, model or draft.model)
        except BaseException:
            self._ended("failed")
            raise
        taking = asyncio.create_task(self._take_over(draft, model or draft.model, engine))
        taking.add_done_callback(lambda _: self._ended("done" if _succeeded(taking) else "failed"))
        # From here on a caller that leaves ends nothing: what is shown stays what drafts.
        return await asyncio.shield(taking)

    def _ended(self, outcome: str) -> None:
        self._reloading = False
        self._metrics.swaps.labels(outcome).inc()

    async def _load(self, draft: Draft, model: str) -> Engine:
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(self._loader, load_beside, self._settings, model)
        _check_alike(draft.spec.name, draft.engine.info, engine.info)
        return engine

    async def _take_over(self, draft: Draft, model: str, engine: Engine) -> Reloaded:
        def take() -> None:
            made: SSMDrafter = make_model_drafter(self._settings, draft.spec, engine)
            draft.drafter.swap(made)

        await asyncio.wrap_future(self._grower.between_drafts(take))
        before = draft.engine.info
        draft.engine, draft.model = engine, model
        self._metrics.show_draft(draft.spec.name, engine.info)
        moved, kept = self._sessions.move()
        settle_heap()
        log.info(
            "draft.reloaded", drafter=draft.spec.name, revision=engine.info.revision, moved=moved
        )
        return Reloaded(draft.spec.name, before, engine.info, moved, kept)

    def _find(self, name: str) -> Draft:
        names = [draft.spec.name for draft in self.drafts]
        if not name and len(names) == 1:
            return self.drafts[0]
        if name not in names:
            known = ", ".join(names) or "none"
            raise NotServed(f"draft model {name!r} is not one of this speculator's: {known}")
        return self.drafts[names.index(name)]

    def _check_folder(self, model: str) -> None:
        """Callers of an RPC name no folder but those that whoever runs this process offers."""
        root = self._settings.drafts_root
        if root is None or not Path(model).resolve().is_relative_to(root.resolve()):
            raise PermissionDenied(
                f"draft folder {model[:256]!r} may not be named; "
                f"allowed: below --drafts-root, {root}"
            )


def _succeeded(task: asyncio.Task[Reloaded]) -> bool:
    return not task.cancelled() and task.exception() is None


def drafts_of(
    settings: SpeculatorSettings, merged: MergedDrafter, engines: Sequence[Engine]
) -> list[Draft]:
    """The draft models among the drafters made of some settings, with their engines."""
    specs = [spec for spec in settings.specs if spec.kind == "ssm"]
    models = [one for one in merged.drafters if isinstance(one, SwappableDrafter)]
    return [Draft(s, s.model, d, e) for s, d, e in zip(specs, models, engines, strict=True)]


def _check_alike(name: str, before: ModelInfo, after: ModelInfo) -> None:
    """Verifiers were told one vocabulary for as long as their streams are open."""
    if after.vocab_size != before.vocab_size:
        raise InvalidRequest(
            f"draft {after.name} has a vocabulary of {after.vocab_size} tokens; that of {name}, "
            f"{before.name}, has {before.vocab_size}"
        )
    if after.tokenizer_hash != before.tokenizer_hash:
        raise InvalidRequest(
            f"draft {after.name} has tokenizer {after.tokenizer_hash!r}; that of {name}, "
            f"{before.name}, is {before.tokenizer_hash!r}"
        )
