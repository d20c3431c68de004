"""Every environment variable Luthier reads, in one class."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PROJECT = Path(__file__).resolve().parent.parent
"""The folder that holds the packages: a checkout, or where pip put them."""
_WHEEL = Path(__file__).resolve().parent / "resources"
RESOURCES = _WHEEL if _WHEEL.is_dir() else PROJECT
"""The folder that holds `templates/`, `static/`, `migrations/`, `samples/` and `alembic.ini`; a wheel has one of its own (setup.py)."""


def default_data_dir() -> Path:
    """The default data folder.

    Root's home is closed to the unprivileged user that runs the database, so root gets a folder under /var/lib.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/luthier")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "luthier"


class MachineKind(BaseModel):
    """A kind of machine, as an operator describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cores: int = Field(8, ge=1)
    memory_bytes: int = Field(32 * 10**9, ge=10**9)
    gpus: int = Field(0, ge=0, le=64)
    gpu_name: str = ""
    gpu_memory_bytes: int = Field(0, ge=0)
    gpu_capability: float | None = None

    @model_validator(mode="after")
    def _has_memory(self) -> MachineKind:
        if self.gpus and self.gpu_memory_bytes < 10**9:
            raise ValueError("gpu_memory_bytes is needed where there are GPUs, and is at least 1 GB")
        return self


class Settings(BaseSettings):
    """One field per variable; `data_dir` is read from `LUTHIER_DATA_DIR`, and so on."""

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", extra="ignore")

    data_dir: Path = Field(default_factory=default_data_dir, description="Folder of the database, files, models and runs.")
    host: str = Field("127.0.0.1", description="Address the web process listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port the web process listens on.")
    public_url: str | None = Field(None, description="Address people type, when a proxy is in front; otherwise host and port.")
    admin_name: str = Field("owner", min_length=1, max_length=80, description="Name of the first account.")
    admin_password: str | None = Field(
        None, description="Password of the first account; needed before another address than 127.0.0.1 is opened."
    )
    oidc_issuer: str | None = Field(
        None, description="Issuer of an OpenID Connect provider whose accounts sign in here, as it names itself."
    )
    oidc_client_id: str = Field("luthier", description="This studio's client id there.")
    oidc_client_secret: str | None = Field(None, description="Its client secret; without one it is a public client, with PKCE alone.")
    oidc_name: str = Field("single sign-on", max_length=60, description="What the button on the sign-in page calls the provider.")
    trusted_hosts: str = Field(
        "", description="Further host names the studio answers to, with commas; addresses, localhost and public_url always work."
    )
    forwarded_allow_ips: str = Field(
        "",
        description="Addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, with commas; of nobody else.",
    )
    max_connections: int = Field(12_000, ge=16, description="Connections the web process holds at once; fewer where descriptors are few.")
    max_connections_per_address: int = Field(
        1_000,
        ge=8,
        description="Connections of one address (of one /64 in IPv6); this machine and the proxies above may hold all but so many.",
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL of an external PostgreSQL; without it `luthier up` runs its own.")
    redis_url: str | None = Field(
        None, description="URL of an external Redis or Valkey (redis:// or unix://); without it `luthier up` runs its own."
    )
    secrets_dir: Path | None = Field(
        None,
        description="Folder of the secrets that cookies, one-time codes and webhooks are signed with (session.key, two_step.key, webhooks.key, and "
        "hub.token where there is one), given from outside and the same for every process; otherwise made in `secrets/` of data_dir.",
    )
    storage_url: str = Field(
        "",
        pattern=r"^$|^(s3|gs|az)://[^/\s]+(/\S*)?$|^file:///\S+$",
        description="Object storage of files, models, checkpoints and results, as s3://bucket/folder, gs://…, az://… or file:///folder. The "
        "data folder of each machine is then a cache of it, and no folder is shared. Empty: the data folder is all there is.",
    )
    storage_cache_bytes: int | None = Field(
        None,
        ge=0,
        description="What of the object storage each machine keeps in its data folder at most; otherwise four fifths of that disk.",
    )
    offline: bool = Field(False, description="Never ask the Hugging Face hub for anything.")
    import_dirs: str = Field(
        "", description="Folders, with colons, below which a model folder may be added from the browser; `import` in data_dir always is."
    )
    train_workers: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Train workers that `luthier up` starts; otherwise one for every `gpus_per_job` GPUs of this machine.",
    )
    upload_limit_bytes: int = Field(8 * 10**9, ge=1, description="Largest upload accepted, in bytes.")
    lease_seconds: float = Field(30.0, gt=0, description="How long a claim on a job lasts without a beat.")
    beat_seconds: float = Field(5.0, gt=0, description="Pause between two beats of a running job.")
    reap_seconds: float = Field(5.0, gt=0, description="Pause between two rounds of the reaper.")
    announce_again_seconds: float = Field(15.0, gt=0, description="A queued job nobody claimed is announced again after this.")
    deaf_seconds: float = Field(
        60.0, gt=0, description="A worker with a free place that takes nothing of what waits for it for so long is started again."
    )
    stop_grace_seconds: float = Field(60.0, gt=0, description="Time a trainer has to save after SIGTERM before SIGKILL.")
    worker_address: str | None = Field(
        None,
        description="Address at which other machines reach this worker, for a job on several machines; otherwise the one from which it reaches the database.",
    )
    gather_seconds: float = Field(
        120.0,
        gt=0,
        description="How long a worker waits, with its GPUs, for the others of a job on several machines before it does something else.",
    )
    gpus_per_job: int = Field(1, ge=1, le=64, description="Processes that train one job together, one for each GPU of this machine.")
    labels: str = Field(
        "",
        pattern=r"^\s*([A-Za-z0-9][A-Za-z0-9._-]{0,62}\s*(,\s*|$))*$",
        description="Labels of this machine's train workers, with commas, as `a100, team-x`: a job that asks for a label runs only where it is.",
    )
    launcher: str = Field(
        "local",
        pattern=r"^[a-z]+$",
        description="Where the jobs of this train worker train: local, on its own machine; ray, on those of a Ray cluster; kubernetes, in pods.",
    )
    launcher_url: str = Field(
        "",
        pattern=r"^$|^https?://[^\s/]+(/\S*)?$",
        description="Address of the engine of LUTHIER_LAUNCHER: of Ray's dashboard, as http://head:8265; of Kubernetes where the worker is in no pod.",
    )
    launcher_template: Path | None = Field(
        None, description="File with the manifest of a Job, as YAML, from which LUTHIER_LAUNCHER=kubernetes makes one for each attempt."
    )
    launcher_python: str = Field("python", min_length=1, description="The Python of the machines that the engine starts jobs on.")
    launcher_waiting: int = Field(
        4, ge=1, le=1000, description="Jobs that wait for a machine in the engine at once; it starts them in its own order."
    )
    launcher_machine: MachineKind | None = Field(
        None,
        description="One of the machines that the engine starts jobs on, as JSON: cores, memory_bytes, gpus, gpu_name, gpu_memory_bytes and "
        "gpu_capability. What fits it is handed over, and estimates are made for it. Otherwise they are taken to be like this worker's machine.",
    )
    reserve_after_seconds: float = Field(
        600.0,
        ge=0,
        description="A job that has waited so long and is next for a machine of which too few GPUs are free has them kept for it.",
    )
    gpu_memory_bytes: int | None = Field(
        None,
        ge=2**30,
        description="Memory of a GPU that may be used, as if it had no more: a large one plays a smaller one. Otherwise all.",
    )
    confinement: Literal["auto", "required", "off"] = Field(
        "auto",
        description="Walls around what opens foreign data (trainers, evaluations, readers, converters). auto takes all that this machine "
        "allows, see `luthier doctor`; required starts nothing where files, network, privileges or memory would stay open.",
    )
    kernels: Literal["auto", "plain"] = Field(
        "auto",
        description="How a step is computed: auto takes the fastest way there is; plain takes none of Luthier's own kernels, fused layers, "
        "threads over a batch and compiled layers, to find out whether one of them makes a result wrong. It is several times slower.",
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "off",
        description="auto captures the passes of small models (to 500 M parameters) over packs of one shape as CUDA graphs and replays them, in "
        "long jobs on a GPU. Off until a GPU has run it.",
    )
    fair_share_half_life_hours: float = Field(
        24.0, gt=0, description="Half-life of what a person has used of the machine: who used least of it lately is next in the queue."
    )
    high_priority: Literal["admins", "members"] = Field("admins", description="Who may start a run of high priority.")
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="Price of a GPU-hour, shown as the cost of runs; a train worker without a GPU counts as one."
    )
    price_per_kwh: float | None = Field(None, ge=0, description="Price of a kilowatt-hour, where the GPU counts its energy.")
    currency: str = Field("EUR", max_length=8, description="Currency of these prices.")
    limit_running_jobs: int | None = Field(None, ge=0, description="Most runs of one person that train at once; further ones wait.")
    limit_queued_jobs: int | None = Field(None, ge=0, description="Most runs of one person that wait in the queue.")
    limit_gpu_hours_per_month: float | None = Field(
        None,
        ge=0,
        description="GPU-hours of one person in a month, after which no further run is taken; a train worker without a GPU counts as one.",
    )
    limit_storage_bytes: int | None = Field(None, ge=0, description="Files, models and checkpoints of one person, in bytes.")
    limit_tokens_per_day: int | None = Field(
        None, ge=0, description="Tokens that models write, embed or classify for one person in a day (UTC)."
    )
    limit_requests_per_minute: int | None = Field(None, ge=0, description="Requests of the API by one person in a minute.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept per job, besides the best one.")
    keep_playground_days: float | None = Field(
        None, ge=0, description="Conversations of the playground and answers of the API are removed after so many days; saved ones stay."
    )
    keep_log_days: float | None = Field(None, ge=0, description="Logs of jobs and evaluations are removed so many days after their end.")
    keep_checkpoint_days: float | None = Field(
        None, ge=0, description="Checkpoints of a job are removed so many days after its end; its model and kept checkpoints stay."
    )
    keep_export_days: float | None = Field(None, ge=0, description="Exports are removed after so many days.")
    keep_deleted_days: float | None = Field(
        None, ge=0, description="The record of what was deleted is removed after so many days, once nothing refers to it."
    )
    generate_memory_bytes: int | None = Field(
        None, ge=0, description="Memory the playground's models and their caches may take; otherwise half of the machine's."
    )
    generate_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Numbers the playground computes in on a processor. bf16 is faster where there are instructions for it (AVX-512 BF16, "
        "AMX), but its answers differ from those of training's own scores, and with what else is being answered. A GPU always takes bf16.",
    )
    generate_idle_seconds: float = Field(
        1800.0,
        gt=0,
        description="A model of the playground that nobody has used for so long is unloaded; the next request loads it again.",
    )
    engines: str = Field(
        "",
        description="Addresses of OpenAI-compatible servers (vLLM, say) that may answer for a model, with commas, as "
        "`http://10.0.0.5:8001/v1`; a key goes before the host, as in `https://:KEY@gpu.example.org/v1`.",
        repr=False,
    )
    webhook_hosts: str = Field(
        "",
        description="Hosts that webhooks may be sent to, with commas, as `hooks.example.com`; with a port where it is none of 80 and 443.",
    )
    trackers: str = Field(
        "",
        description="Trackers that every job is sent to, with commas, besides those in its `integrations`: tensorboard, mlflow, trackio, wandb.",
    )
    mlflow: str = Field(
        "",
        description="Addresses of MLflow servers that jobs may be sent to, with commas, the usual one first; a token or a name and password "
        "go before the host, as in `https://:TOKEN@mlflow.example.org`.",
        repr=False,
    )
    trackio: str = Field(
        "",
        description="Addresses of Trackio servers that jobs may be sent to, with commas, the usual one first; the write token goes before "
        "the host, as in `http://:TOKEN@10.0.0.5:7860`.",
        repr=False,
    )
    wandb: str = Field(
        "",
        description="Address of Weights & Biases with a key before the host, as `https://:KEY@api.wandb.ai`; or `offline`, to write each run "
        "to a folder that `wandb sync` sends. Needs the extra `trackers`.",
        repr=False,
    )
    cpu_engine: str = Field(
        "luthier",
        pattern=r"^(luthier|llama\.cpp(:[A-Z0-9_]+)?)$",
        description="What answers on a processor where a model names nothing else: `luthier`, the built-in engine, whose numbers are those "
        "of training; or `llama.cpp`, about twice as fast, in the GGUF type after a colon (`llama.cpp:Q8_0`; F16 where there is none).",
    )
    generate_context: int = Field(8192, ge=16, description="Longest prompt and answer together, in tokens, where the model reads more.")
    log_format: Literal["text", "json"] = Field("text", description="Shape of the log lines.")
    smtp_url: str | None = Field(
        None,
        repr=False,
        description="Mail server for messages on a job's end, as smtp://user:password@host:587 (with STARTTLS) or smtps://host:465.",
    )
    mail_from: str = Field("luthier@localhost", description="Sender of these messages.")
    mail_to: str = Field("", description="Who gets a message when a job ends or pauses, with commas.")
    traces: Literal["off", "console", "otlp"] = Field(
        "off",
        description="Where OpenTelemetry traces go, from the request to the trainer: nowhere, to the log, or by OTLP to OTEL_EXPORTER_OTLP_ENDPOINT. "
        "Needs the extra `otel`.",
    )
    log_level: str = Field("INFO", description="Least severe level that is logged.")

    @property
    def address(self) -> str:
        """The address of this studio in a link."""
        return (self.public_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def worker_labels(self) -> tuple[str, ...]:
        return tuple(sorted({label.strip() for label in self.labels.split(",")} - {""}))

    def folder(self, *parts: str) -> Path:
        """A folder under the data folder, created when missing, readable by its owner alone."""
        path = self.data_dir.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path


@functools.cache
def get_settings() -> Settings:
    """The settings of this process, read once. Tests call `get_settings.cache_clear()` after changing the environment."""
    settings = Settings()
    settings.data_dir = settings.data_dir.expanduser().absolute()
    return settings
