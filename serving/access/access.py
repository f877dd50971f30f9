"""The one decision of who may do what, for HTTP and gRPC alike."""

from __future__ import annotations

import dataclasses

from serving.access.keys import Caller, KeyRing, Role
from serving.errors import ErrorKind, RequestError

BEARER = "bearer "


@dataclasses.dataclass(frozen=True)
class Access:
    """What a server asks of its callers.

    Attributes:
        keys: those accepted; without any, requests need none, and control is closed.
        share_prefix_cache: let requests of different keys share cached prompt pages. How fast a prompt's first token
            comes tells whether somebody sent it before, so without this only requests of one key share.
    """

    keys: KeyRing = dataclasses.field(default_factory=KeyRing)
    share_prefix_cache: bool = False

    def check(self, authorization: str | None) -> Caller | None:
        """Who is calling, by an `Authorization` header or metadata; None where nobody is asked.

        Raises:
            RequestError: UNAUTHENTICATED.
        """
        if not self.keys:
            return None
        if not authorization:
            raise _unauthenticated("This server needs an API key. Send it as 'Authorization: Bearer <key>'.")
        if authorization[: len(BEARER)].lower() != BEARER:
            raise _unauthenticated("The Authorization header must be 'Bearer <key>'.")
        caller = self.keys.find(authorization[len(BEARER) :].strip())
        if caller is None:
            raise _unauthenticated("The API key is not one of this server's.")
        if self.share_prefix_cache or caller.role is Role.PROXY:  # a gateway has scoped its clients' requests itself
            return caller
        return dataclasses.replace(caller, cache_scope=caller.name)

    def may_see_figures(self, caller: Caller | None) -> bool:
        """Whether a caller may see what the server does for everybody together: how much others ask, and when, is theirs."""
        return not self.keys or (caller is not None and caller.role.allows(Role.MONITOR))

    def check_figures(self, caller: Caller | None) -> None:
        """Refuses who may not see that.

        Raises:
            RequestError: PERMISSION_DENIED.
        """
        if not self.may_see_figures(caller):
            raise RequestError(
                ErrorKind.PERMISSION_DENIED,
                "This tells of all users together, and needs a key of the role monitor, proxy or admin: start the server with "
                "--monitor-api-key, or with such a key in --api-key-file.",
                code="monitor_key_needed",
            )

    def check_control(self, caller: Caller | None) -> None:
        """Refuses who may not change the server. Without an admin key nobody may: a web page that a visitor of this
        machine opens could otherwise send a server on localhost to sleep.

        Raises:
            RequestError: PERMISSION_DENIED.
        """
        if not self.keys.has_admin:
            raise RequestError(
                ErrorKind.PERMISSION_DENIED,
                "Control is closed: start the server with --admin-api-key, or an admin key in --api-key-file.",
                code="control_closed",
            )
        if caller is None or not caller.role.allows(Role.ADMIN):
            raise RequestError(ErrorKind.PERMISSION_DENIED, "This needs an admin key.", code="admin_key_needed")

    def check_watch(self, caller: Caller | None) -> None:
        """Refuses who may not see what others have sent. Without keys everybody may: the operator has opened it.

        Raises:
            RequestError: PERMISSION_DENIED.
        """
        if self.keys and (caller is None or not caller.role.allows(Role.PROXY)):
            raise RequestError(
                ErrorKind.PERMISSION_DENIED, "This needs a key of role proxy or admin.", code="proxy_key_needed"
            )


def _unauthenticated(message: str) -> RequestError:
    return RequestError(ErrorKind.UNAUTHENTICATED, message, code="invalid_api_key")
