"""Every table. Postgres is the truth; whatever is in Redis can be wiped at any moment.

Times are `timestamptz` written by the database's clock. Paths are relative to the data folder. Sizes are bytes.
"""

from __future__ import annotations

from app.tables._base import JSON, Base, Leased
from app.tables.audit import AuditLog
from app.tables.batches import BatchAnswer, RequestBatch
from app.tables.datasets import Dataset, File, Finding, Inspection, Upload, UploadPiece
from app.tables.distillations import DistillationRun, DistilledRow
from app.tables.evals import Eval, EvalItem, EvalRun
from app.tables.evaluations import Evaluation
from app.tables.graders import SavedGrader
from app.tables.jobs import Checkpoint, CheckpointPermission, Comparison, Event, Job, JobPlace
from app.tables.learning import StopVisit
from app.tables.models import AliasMove, Export, Model, ModelAlias
from app.tables.outbox import Outbox
from app.tables.playground import Answer, Exchange, Vote
from app.tables.projects import Project, ProjectMember, ShareLink
from app.tables.prompts import Prompt, PromptResult, PromptRun, PromptVersion
from app.tables.tracking import TrackedRun
from app.tables.usage import MachineUse, TokenUse
from app.tables.users import ApiKey, BrowserSession, Identity, Invitation, SignInLink, TwoStep, User
from app.tables.webhooks import WebhookDelivery, WebhookEndpoint

__all__ = [
    "JSON",
    "AliasMove",
    "Answer",
    "ApiKey",
    "AuditLog",
    "Base",
    "BatchAnswer",
    "BrowserSession",
    "Checkpoint",
    "CheckpointPermission",
    "Comparison",
    "Dataset",
    "DistillationRun",
    "DistilledRow",
    "Eval",
    "EvalItem",
    "EvalRun",
    "Evaluation",
    "Event",
    "Exchange",
    "Export",
    "File",
    "Finding",
    "Identity",
    "Inspection",
    "Invitation",
    "Job",
    "JobPlace",
    "Leased",
    "MachineUse",
    "Model",
    "ModelAlias",
    "Outbox",
    "Project",
    "ProjectMember",
    "Prompt",
    "PromptResult",
    "PromptRun",
    "PromptVersion",
    "RequestBatch",
    "SavedGrader",
    "ShareLink",
    "SignInLink",
    "StopVisit",
    "TokenUse",
    "TrackedRun",
    "TwoStep",
    "Upload",
    "UploadPiece",
    "User",
    "Vote",
    "WebhookDelivery",
    "WebhookEndpoint",
]
