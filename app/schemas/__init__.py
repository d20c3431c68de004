"""Schemas of the API's requests and responses, one file per noun.

Request models validate. Response models only describe: a response is built by the function that knows the object, and is sent
without passing through a model. They define its shape in the OpenAPI document (`app.schemas.openapi`), and the tests check every
response against that document. A field with a default may be absent.
"""

from app.schemas.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Classifications,
    Completion,
    CompletionChunk,
    Embeddings,
    NextTokensOfModels,
)
from app.schemas.audit import AuditLog
from app.schemas.base import Deleted, list_of, page_of
from app.schemas.batches import Batch
from app.schemas.comparisons import Comparison, ComparisonPlan, CreateComparison
from app.schemas.datasets import (
    Dataset,
    DatasetChanges,
    DatasetLine,
    DatasetReport,
    DatasetRows,
    DatasetSplit,
    DatasetWithVersions,
    FileReport,
    FixedDataset,
    VoteDataset,
)
from app.schemas.distillations import CreateDistillation, Distillation, DistilledRows
from app.schemas.evals import ChangeEval, CreateEval, CreateEvalRun, DeletedEval, DeletedEvalRun, Eval, EvalOutputItem, EvalRun
from app.schemas.evaluations import Evaluation
from app.schemas.exports import CreateExport, Export, PushExport
from app.schemas.files import CompleteUpload, CreateFile, CreateUpload, CreateUploadPart, PartedUpload, UploadedFile, UploadPart
from app.schemas.fine_tuning import (
    CheckpointPermission,
    CreateCheckpointPermissions,
    CreateJob,
    FineTuningCheckpoint,
    FineTuningJob,
    FineTuningJobEvent,
    JobEstimate,
    JobTracker,
    StreamedJobEvent,
)
from app.schemas.graders import (
    ChangeGrader,
    CompareAnswers,
    CreateGrader,
    GraderComparison,
    GraderRun,
    RunGrader,
    SavedGrader,
    ValidateGrader,
    ValidGrader,
)
from app.schemas.models import Engine, EngineCheck, EngineOfModel, HubModel, LoadedModels, Model, ModelAlias, ModelAliasMove
from app.schemas.people import ChangePerson, CreateInvite, Invite, Person
from app.schemas.predictions import Prediction
from app.schemas.projects import AddMember, ChangeMember, ChangeProject, NameProject, Project, ProjectContents, ProjectMember
from app.schemas.prompts import CreatePrompt, CreatePromptRun, Prompt, PromptRun, PromptRunRows, RevisePrompt
from app.schemas.response_answers import ListedItem, Response, ResponseEvent
from app.schemas.searches import CreateSearch, Search, SearchPlan
from app.schemas.stored import ChangeStored, CreateStoredDataset, StoredMessage, StoredRows
from app.schemas.studio import OpenAPIDocument, Strategy, StrategyAdvice, Studio
from app.schemas.votes import Vote, VoteScores
from app.schemas.webhooks import (
    ChangeWebhookEndpoint,
    CreateWebhookEndpoint,
    DeletedWebhookEndpoint,
    RotateWebhookSecret,
    TryWebhookEndpoint,
    WebhookEndpoint,
    WebhookEndpointTest,
    WebhookEndpointWithSecret,
    WebhookEventTypes,
)

__all__ = [
    "AddMember",
    "AuditLog",
    "Batch",
    "ChangeEval",
    "ChangeGrader",
    "ChangeMember",
    "ChangePerson",
    "ChangeProject",
    "ChangeStored",
    "ChangeWebhookEndpoint",
    "ChatCompletion",
    "ChatCompletionChunk",
    "CheckpointPermission",
    "Classifications",
    "CompareAnswers",
    "Comparison",
    "ComparisonPlan",
    "CompleteUpload",
    "Completion",
    "CompletionChunk",
    "CreateCheckpointPermissions",
    "CreateComparison",
    "CreateDistillation",
    "CreateEval",
    "CreateEvalRun",
    "CreateExport",
    "CreateFile",
    "CreateGrader",
    "CreateInvite",
    "CreateJob",
    "CreatePrompt",
    "CreatePromptRun",
    "CreateSearch",
    "CreateStoredDataset",
    "CreateUpload",
    "CreateUploadPart",
    "CreateWebhookEndpoint",
    "Dataset",
    "DatasetChanges",
    "DatasetLine",
    "DatasetReport",
    "DatasetRows",
    "DatasetSplit",
    "DatasetWithVersions",
    "Deleted",
    "DeletedEval",
    "DeletedEvalRun",
    "DeletedWebhookEndpoint",
    "Distillation",
    "DistilledRows",
    "Embeddings",
    "Engine",
    "EngineCheck",
    "EngineOfModel",
    "Eval",
    "EvalOutputItem",
    "EvalRun",
    "Evaluation",
    "Export",
    "FileReport",
    "FineTuningCheckpoint",
    "FineTuningJob",
    "FineTuningJobEvent",
    "FixedDataset",
    "GraderComparison",
    "GraderRun",
    "HubModel",
    "Invite",
    "JobEstimate",
    "JobTracker",
    "ListedItem",
    "LoadedModels",
    "Model",
    "ModelAlias",
    "ModelAliasMove",
    "NameProject",
    "NextTokensOfModels",
    "OpenAPIDocument",
    "PartedUpload",
    "Person",
    "Prediction",
    "Project",
    "ProjectContents",
    "ProjectMember",
    "Prompt",
    "PromptRun",
    "PromptRunRows",
    "PushExport",
    "Response",
    "ResponseEvent",
    "RevisePrompt",
    "RotateWebhookSecret",
    "RunGrader",
    "SavedGrader",
    "Search",
    "SearchPlan",
    "StoredMessage",
    "StoredRows",
    "Strategy",
    "StrategyAdvice",
    "StreamedJobEvent",
    "Studio",
    "TryWebhookEndpoint",
    "UploadPart",
    "UploadedFile",
    "ValidGrader",
    "ValidateGrader",
    "Vote",
    "VoteDataset",
    "VoteScores",
    "WebhookEndpoint",
    "WebhookEndpointTest",
    "WebhookEndpointWithSecret",
    "WebhookEventTypes",
    "list_of",
    "page_of",
]
