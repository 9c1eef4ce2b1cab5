"""Settings of a service: read once at start, from flags and environment, then frozen.

pydantic-settings does the reading: a flag `--pool-tokens` is the field `pool_tokens` and the
environment variable `TREECAST_POOL_TOKENS`; flags win.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as ParserError

from treecast.errors import SettingsError

ENV_PREFIX = "TREECAST_"

GIB = 2**30
"""Bytes of a GiB."""

POOL_TOKENS = 16384
"""Of a KV pool, unless a size is given."""

DType = Literal["auto", "bfloat16", "float32"]
"""Of weights and activations; auto: bfloat16 where the processor multiplies it, else float32."""

Weights = Literal["auto", "float32", "bfloat16", "int8", "int4"]
"""In what linear layers' weights are kept on CPU, whatever the activations are."""

KVDType = Literal["auto", "bfloat16", "float16", "float32", "int8", "fp8"]
"""Of the KV pool; auto: what attention computes in; int8 and fp8 are lossy."""


Numerics = Literal["exact", "fast", "oracle"]
"""Exact: bits do not depend on tree or batch; fast: free to reorder; oracle: one row at a time."""


def split_commas(given: str | Iterable[str]) -> tuple[str, ...]:
    """A field's items: comma-separated, and a flag may be repeated."""
    items = [given] if isinstance(given, str) else given
    return tuple(part.strip() for item in items for part in item.split(",") if part.strip())


class ServiceSettings(BaseSettings):
    """What every service has. A role adds its own fields in a subclass."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        frozen=True,
        extra="forbid",
    )

    listen: str = Field("127.0.0.1:0", description="address to serve gRPC on; port 0 picks one")
    advertise: str | None = Field(
        None, description="address that others reach this process by; default: the bound one"
    )
    metrics_listen: str | None = Field(
        "127.0.0.1:0", description="address to serve /metrics on; empty for none"
    )
    redis_url: str | None = Field(
        None,
        description="redis://user:password@host:port/db for registry, leases and quotas; rediss:// "
        "with TLS, redis+cluster:// and rediss+cluster:// for a cluster; unset: seeds only",
    )
    tls_cert: Path | None = Field(
        None, description="our certificate, PEM, read anew when it changes; unset: plaintext"
    )
    tls_key: Path | None = Field(None, description="its private key, PEM")
    tls_ca: Path | None = Field(
        None, description="authority of all peers, PEM: both ends of every hop show certificates"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+$",
        description="http://host:port of an OpenTelemetry collector that takes spans by gRPC, "
        "https:// over TLS; unset: none are made; needs the extra 'traces'",
    )
    log_level: str = Field("info", description="debug, info, warning or error")
    log_json: bool = Field(True, description="JSON log lines; otherwise for people")
    announce: bool = Field(
        False, description="print one JSON line with the bound addresses on stdout when ready"
    )

    @classmethod
    def load(cls, argv: Sequence[str], prog: str) -> Self:
        """Parse flags and environment.

        Raises:
            SettingsError: a value is bad or unknown; the message names it.
        """
        config = SettingsConfigDict(cli_prog_name=prog, cli_exit_on_error=False)
        try:
            body = {"model_config": config, "__doc__": cls.__doc__}
            reader: type[Self] = type(cls.__name__, (cls,), body)
            return reader(_cli_parse_args=list(argv))  # type: ignore[call-arg]
        except ValidationError as error:
            raise SettingsError(_first_fault(error)) from error
        except ParserError as error:
            raise SettingsError(str(error)) from error


class ModelSettings(ServiceSettings):
    """What every service that holds a model has."""

    engine: Literal["hf", "toy"] = Field("hf", description="hf: a real model; toy: for tests")
    dtype: DType = Field(
        "auto",
        description="weights and activations; auto: bfloat16 where the processor multiplies it, "
        "else float32",
    )
    weights: Weights = Field(
        "auto",
        description="of linear layers on CPU, whatever the dtype; bfloat16, int8 and int4 take a "
        "half, a quarter and a sixth of float32's memory, which steps of few rows wait for; auto: "
        "16 bits where they lose nothing",
    )
    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda, or one of several: cuda:1"
    )
    toy_step_s: float = Field(0.0, ge=0, description="toy engine: seconds that a pass takes")


def as_environment(settings: ServiceSettings) -> dict[str, str]:
    """Variables that a child process reads the same settings from; it is given no flags.

    Of what was set, not of defaults. Variables rather than flags: everybody can see a command line.
    """
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {
        f"{ENV_PREFIX}{name}".upper(): ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in given.items()
        if value is not None
    }


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    name = str(fault["loc"][0])  # behind it, which item, or which of a field's forms
    flag = f"--{name.replace('_', '-')} (or {ENV_PREFIX}{name.upper()})"
    return f"{flag} is {fault['input']!r}: {fault['msg']}"


_NOT_SETTINGS = {"TREECAST_HOME", "TREECAST_ROUTER", "TREECAST_API_KEY"}


def unknown_variables(settings: type[ServiceSettings]) -> list[str]:
    """Environment variables with our prefix that a service does not read: typing errors, maybe.

    Reported, not refused: several roles may share one environment.
    """
    known = {f"{ENV_PREFIX}{field}".upper() for field in settings.model_fields} | _NOT_SETTINGS
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)
