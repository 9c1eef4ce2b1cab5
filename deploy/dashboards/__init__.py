"""Dashboards and alerts as code: `python -m treecast.dashboards` writes what the chart mounts."""
