"""Tracking services by name (`tables.TRACKERS`): each is a `Service` (services.py)."""
