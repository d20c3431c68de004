"""Who may see what concerns the whole studio."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from app.errors import Forbidden
from app.tables import User
from app.web.auth import CurrentUser


async def require_admin(user: CurrentUser) -> User:
    """The user of a request, who is an admin. Raises Forbidden."""
    if user.role != "admin":
        raise Forbidden("This is for admins of the studio.", hint="Ask an admin for it.", code="admin_only")
    return user


AdminUser = Annotated[User, Depends(require_admin)]
"""What a route for admins declares: `user: AdminUser`."""
