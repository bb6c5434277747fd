"""A database with many rows, filled by SQL alone: what a service looks like after a year."""

from __future__ import annotations

from sqlalchemy import Engine

from app.db.orm import LOCAL_TENANT

JOBS_OF_A_MODEL = 20
CHAINED_EVERY = 100  # job, whose second model is that of number 3
_KINDS = ("model", "report", "manifest", "engine", "bundle", "output", "key")

_MODELS = """
    INSERT INTO source_models
        (id, tenant_id, name, filename, format, sha256, size_bytes, inputs, outputs, detail, created_at)
    SELECT {id_of_model}, '{tenant}', 'net', 'net.onnx', 'onnx', {model}, 1, '[]', '[]', '{{}}', {then}
    FROM {numbers}
"""
_JOBS = """
    INSERT INTO jobs
        (id, tenant_id, model_id, status, progress, spec, queue, stages, engine_ids, report_sha256, manifest_sha256,
         correlation_id, version, attempts, fencing_token, webhook_attempts, spent_seconds, created_at, finished_at,
         told, tallied_at)
    SELECT {id_of_job}, '{tenant}', {id_of_its_model}, CASE WHEN n / 10 * 10 = n THEN 'failed' ELSE 'succeeded' END, 1,
        {spec}, 'anneal.cpu', '{stages}', '[]', {report}, {manifest}, 'filled', 20, 1, 1, 0, 1, {then}, {then},
        true, {tallied}
    FROM {numbers}
"""
_EVENTS = """
    INSERT INTO job_events (job_id, seq, type, data, created_at)
    SELECT {id_of_job}, {seq}, 'state', '{{"status": "succeeded"}}', {then} FROM {numbers}
"""
_ENGINES = """
    INSERT INTO engines
        (id, tenant_id, job_id, model_id, backend, format, precision, filename, sha256, size_bytes, bundle_filename,
         bundle_sha256, bundle_size_bytes, hardware, runtime, metrics, created_at)
    SELECT {id_of_engine}, '{tenant}', {id_of_job}, {id_of_its_model}, 'onnxruntime', 'onnx', 'int8', 'net.onnx',
        {engine}, 1, 'net.zip', {bundle}, 1, '{{}}', '{{}}', '{{}}', {then}
    FROM {numbers} WHERE n / 10 * 10 <> n
"""
_RESULTS = """
    INSERT INTO stage_results (tenant_id, key, stage, outputs, data, seconds, created_at, used_at)
    SELECT '{tenant}', {key}, 'export',
        {to_json}('{{"model": [{{"sha256": "' || {output} || '"}}], "engine": [{{"sha256": "' || {engine}
            || '"}}, {{"sha256": "' || {bundle} || '"}}]}}'){as_json},
        '{{}}', 1, {then}, {now}
    FROM {numbers}
"""
_FILES = "INSERT INTO stage_files (tenant_id, key, sha256) SELECT '{tenant}', {key}, {file} FROM {numbers}"
_BLOBS = """
    INSERT INTO blobs (tenant_id, sha256, size_bytes, created_at) SELECT '{tenant}', {blob}, 1, {then} FROM {numbers}
"""
_SPEC = '{"objective": "latency", "validation": {"metric": "auto"}, "benchmark": {"batch_sizes": [1, 8]}'
_MEMBERS = """
    INSERT INTO chain_members (model_id, job_id)
    SELECT '{chained_model}', {id_of_job} FROM {numbers} WHERE n / {every} * {every} = n
"""
_STAGE = '{"name": "benchmark", "status": "succeeded", "seconds": 12.5, "cached": false, "candidate": "ort-int8-stat"}'


def fill(engine: Engine, jobs: int, stages: int = 12) -> None:
    """So many ended jobs of the local tenant, each with report, manifest, (nine of ten) an engine and a stage result of
    three files; their models; and the rows of all these blobs, none of which is in storage. A job's row is about as
    large as a real one's, with so many `stages`."""
    names = _expressions(engine.dialect.name, stages)
    models, rows = _with_numbers(engine, names, jobs)
    with engine.begin() as connection:
        connection.exec_driver_sql(_MODELS.format(**models))
        for statement in (_JOBS, _MEMBERS, _ENGINES, _RESULTS):
            connection.exec_driver_sql(statement.format(**rows, tallied="NULL"))
        for kind in ("output", "engine", "bundle"):
            connection.exec_driver_sql(_FILES.format(**rows, file=names[kind]))
        connection.exec_driver_sql(_BLOBS.format(**models, blob=names["model"]))
        for kind in ("report", "manifest", "engine", "bundle", "output"):
            connection.exec_driver_sql(_BLOBS.format(**rows, blob=names[kind]))


def fill_with_jobs(engine: Engine, jobs: int, stages: int = 12) -> None:
    """The jobs of `fill` alone, with their models and two events each, tallied as those of a service that runs are."""
    names = _expressions(engine.dialect.name, stages)
    models, rows = _with_numbers(engine, names, jobs)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(_MODELS.format(**models))
        connection.exec_driver_sql(_JOBS.format(**rows, tallied=names["then"]))
        connection.exec_driver_sql(_MEMBERS.format(**rows))
        for seq in (1, 20):
            connection.exec_driver_sql(_EVENTS.format(**rows, seq=seq))
        failed = jobs // JOBS_OF_A_MODEL * JOBS_OF_A_MODEL // 10
        for status, count in (("failed", failed), ("succeeded", 9 * failed)):
            told = f"UPDATE job_tallies SET jobs = jobs + {count} WHERE status = '{status}'"
            connection.exec_driver_sql(told)


def _with_numbers(engine: Engine, names: dict[str, str], jobs: int) -> tuple[dict[str, str], dict[str, str]]:
    models = names | {"numbers": _numbers(engine.dialect.name, max(jobs // JOBS_OF_A_MODEL, 1))}
    return models, names | {"numbers": _numbers(engine.dialect.name, jobs // JOBS_OF_A_MODEL * JOBS_OF_A_MODEL)}


def analyze(engine: Engine) -> None:
    """What PostgreSQL's autovacuum does by itself where it runs."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE")


def digest(kind: str, number: int) -> str:
    """The digest of a file (`model`, `report`, `manifest`, `engine`, `bundle`, `output`), or the `key` of a stage's
    result. Numbers count from 1."""
    return f"{_KINDS.index(kind) + 1}{number:063d}"


def model_id(number: int) -> str:
    return f"mdl_{number:032d}"


def job_id(number: int) -> str:
    return f"job_{number:032d}"


def _expressions(dialect: str, stages: int) -> dict[str, str]:
    postgres = dialect == "postgresql"

    def padded(number: str, width: int) -> str:
        return f"lpad(({number})::text, {width}, '0')" if postgres else f"printf('%0{width}d', {number})"

    chained, every = model_id(3), CHAINED_EVERY
    chain = f'"chain": {{"then": [{{"model_id": "{chained}"}}]}}'
    return {
        **{kind: f"('{i + 1}' || {padded('n', 63)})" for i, kind in enumerate(_KINDS)},
        "id_of_model": f"('mdl_' || {padded('n', 32)})",
        "id_of_its_model": f"('mdl_' || {padded(f'(n - 1) / {JOBS_OF_A_MODEL} + 1', 32)})",
        "id_of_job": f"('job_' || {padded('n', 32)})",
        "id_of_engine": f"('eng_' || {padded('n', 32)})",
        "tenant": LOCAL_TENANT,
        "then": "timestamp '2026-01-01'" if postgres else "'2026-01-01 00:00:00.000000'",
        "now": "now()" if postgres else "strftime('%Y-%m-%d %H:%M:%f000', 'now')",
        "chained_model": chained,
        "every": str(every),
        "spec": f"(CASE WHEN n / {every} * {every} = n THEN '{_SPEC}, {chain}}}' ELSE '{_SPEC}}}' END)"
        + ("::jsonb" if postgres else ""),
        "stages": f"[{', '.join([_STAGE] * stages)}]",
        "to_json": "" if postgres else "json",
        "as_json": "::jsonb" if postgres else "",
    }


def _numbers(dialect: str, count: int) -> str:
    """A table of one column, `n` from 1 to `count`."""
    if dialect == "postgresql":
        return f"generate_series(1, {count}) n"
    return (
        f"(WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers LIMIT {count}) "
        "SELECT n FROM numbers)"
    )
