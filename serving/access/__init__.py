"""Who may call: API keys, what each may do and how often, and the TLS files of both protocols."""

from serving.access.access import Access
from serving.access.keys import Caller, KeyRing, Role, caller_of_task
from serving.access.tls import ClientTls, ServerTls

__all__ = ["Access", "Caller", "ClientTls", "KeyRing", "Role", "ServerTls", "caller_of_task"]
