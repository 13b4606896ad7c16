"""The inspector: one child process that holds warm models and answers probe calls; the UI keeps only a client."""

from __future__ import annotations

from core.inspector.client import Inspector
from core.inspector.ticket import Ticket, TicketProgress

__all__ = ["Inspector", "Ticket", "TicketProgress"]
