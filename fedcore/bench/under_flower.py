"""Run a Flower app in Flower's own simulation, as a process: APP_DIR NODES [KEY=VALUE...].

It is what `flwr run` does once its background service has started this process; that service's start is not
in it, so Flower's seconds from shell to end are flattered. Ray is told how many processors this process may
use, which it would not find out by itself; a client gets one of them, and one thread.
"""

import os
import sys
from pathlib import Path

from fedcore.cores import cores

QUIET = {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # otherwise Ray warns of a default that will change
}


def main(folder: Path, nodes: int, overrides: list[str]) -> None:
    """Run an app to its end; an exception of its ServerApp is raised."""
    from flwr.app import Context, RecordDict
    from flwr.app.user_config import UserConfig
    from flwr.common.config import get_fused_config_from_dir, get_project_config, parse_config_args
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supercore.telemetry import EventType

    run = Run.create_empty(run_id=1)
    run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
    run.override_config = parse_config_args(overrides)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    components = get_project_config(folder)["tool"]["flwr"]["app"]["components"]
    config = get_fused_config_from_dir(folder, run.override_config)
    _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.FLWR_SIMULATION_RUN_LEAVE,
        client_app_attr=components["clientapp"],
        server_app_attr=components["serverapp"],
        server_app_context=Context(1, 1, UserConfig(), RecordDict(), config),
        backend_config={
            "init_args": {"num_cpus": cores(), "num_gpus": 0},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
        app_dir=str(folder),
        run=run,
        is_app=True,
    )


if __name__ == "__main__":
    os.environ.update(QUIET)
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3:])
