"""Webhook endpoints, with the names of OpenAI's API."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.schemas.base import Schema


class CreateWebhookEndpoint(BaseModel):
    """An address, and the events that it hears of."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    name: str = Field(min_length=1, max_length=200)
    url: str = Field(min_length=1, max_length=2000, description="On a host that LUTHIER_WEBHOOK_HOSTS lists.")
    event_types: list[str] = Field(min_length=1, max_length=50, description="Of `GET /v1/webhook_event_types`.")


class ChangeWebhookEndpoint(BaseModel):
    """What changes; fields that are omitted stay."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    name: str | None = Field(None, min_length=1, max_length=200)
    url: str | None = Field(None, min_length=1, max_length=2000)
    event_types: list[str] | None = Field(None, min_length=1, max_length=50)


class RotateWebhookSecret(BaseModel):
    """How the secret is replaced."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    keep_old_secret_active_for_24_hours: bool = Field(False, description="Sign with both secrets for a day.")


class TryWebhookEndpoint(BaseModel):
    """The event that is sent as a sample."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    event_type: str = Field(max_length=100)


class WebhookEndpoint(Schema):
    """An address that hears of events of the project."""

    id: str
    object: Literal["webhook_endpoint"]
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str = Field(description="The end of the signing secret.")
    created_at: int
    updated_at: int


class WebhookEndpointWithSecret(WebhookEndpoint):
    """The same with its signing secret, which is shown when the endpoint is created and when the secret is replaced."""

    signing_secret: str


class DeletedWebhookEndpoint(Schema):
    """The endpoint that was deleted."""

    id: str
    object: Literal["webhook_endpoint.deleted"]
    deleted: Literal[True]


class WebhookEndpointTest(Schema):
    """What the endpoint answered to a sample."""

    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True]


class WebhookEventTypes(Schema):
    """Event types of this studio."""

    object: Literal["list"]
    data: list[str]
