"""What a service's metrics say now."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from treecast.services.local import ServiceProcess

_TIMEOUT_S = 10.0


def scrape(process: ServiceProcess) -> list[Sample]:
    """All samples of a process. Blocks.

    Raises:
        OSError: it does not answer.
    """
    url = f"http://{process.metrics_address}/metrics"
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    return [sample for family in families for sample in family.samples]
