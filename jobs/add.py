"""Adds one task to a registered pool, from the registry alone: no earlier data, wherever and whenever the pool was made.

python -m jobs.add jobs/configs/task.yaml --pool models:/tiny.pool.demo@champion training.workers=2
"""

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import ConfigFile, Overrides, check_output, job_command, load_as
from jobs.registry.options import AddTo, Json, RegistryUri, Replace
from jobs.submit_options import Address, SubmittableCommand
from pipeline.config import AddConfig


def main(
    task: ConfigFile,
    pool: AddTo,
    overrides: Overrides = None,
    replace: Replace = False,
    json: Json = False,
    registry: RegistryUri = None,
    address: Address = None,
) -> None:
    """Add one task to a registered pool: train its expert, register it and the pool's next version.

    CONFIG needs a `task` (name, train, eval); base, LoRA and router settings are those of the pool. What others add to the
    same pool meanwhile stays. Earlier tasks are measured on the evaluation prompts that the registry keeps.
    """
    with user_errors():
        settings = load_as(task, overrides, AddConfig)
        if address:
            more = [
                "--pool",
                pool,
                *(["--registry", registry] if registry else []),
                *["--replace"] * replace,
                *["--json"] * json,
            ]
            job_command("jobs.add", task, overrides, address, *more, config_class=AddConfig)
        check_output(settings)
        from jobs.adding import add_to_pool

        add_to_pool(settings, pool, registry, replaces=replace, as_json=json)


if __name__ == "__main__":
    run_alone(main, SubmittableCommand)
