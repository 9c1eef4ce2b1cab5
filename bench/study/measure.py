"""Measuring what a report's folder lacks, section after section."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from .answers import Decoding, Question
from .bed import Bed
from .folder import Finding, Folder, Origin
from .results import Measurements
from .sections import Case, Section

Show = Callable[[str, int, int], None]
"""Told what is about to run, how many cases of its group are done, and how many there are."""


def measure(
    bed: Bed, folder: Folder, sections: Sequence[Section], command: str, show: Show
) -> None:
    """Measure those sections that the folder lacks. Blocks; what is finished survives an interrupt.

    Answers are kept by the batch, sections as they end; calling again goes on with what is missing.

    Raises:
        InvalidRequest: the folder holds figures of other settings.
    """
    folder.check(bed.settings)
    done = {found.section for found in folder.read()}
    missing = [section for section in sections if section not in done]
    _run("answers", list(_unanswered(bed, missing)), show)
    for section in missing:
        began = time.perf_counter()
        measured = _run(section.value, list(section.cases(bed)), show)
        seconds = time.perf_counter() - began
        folder.save(Finding(section, Origin.now(bed.settings, command, seconds), measured))


def _unanswered(bed: Bed, sections: Sequence[Section]) -> list[Case]:
    """Cases for the answers that these sections need and the target has not given yet."""
    needed = dict.fromkeys(each for section in sections for each in section.decodings)
    return [
        Case(f"{decoding.name} from {batch[0].id}", partial(_record, bed, batch, decoding))
        for decoding in needed
        for batch in bed.missing(decoding)
    ]


def _record(bed: Bed, questions: Sequence[Question], decoding: Decoding) -> Measurements:
    """Answers go to a file of their own, so that an interrupt loses one batch at most."""
    bed.record(questions, decoding)
    return Measurements()


def _run(group: str, cases: Sequence[Case], show: Show) -> Measurements:
    parts = []
    for number, case in enumerate(cases):
        show(f"{group}: {case.label}", number, len(cases))
        parts.append(case.run())
    return Measurements.gather(parts)
