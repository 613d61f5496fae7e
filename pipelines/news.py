"""News of a run in words: what happened to it, and what is done about it."""

from collections.abc import Mapping
from typing import Any

from pipelines.words import counted


def told(event: Mapping[str, Any]) -> str | None:
    """Put into words what happened to a run, and what is done about it; None if it is no news."""
    match event["kind"]:
        case "lost":
            return f"workers lost: {event['error']}; going on from step {event['step']}"
        case "started_from":
            return event["said"]
        case "notice":
            who = counted(len(event["nodes"]), "node is", "nodes are")
            return f"{who} about to go: saving a checkpoint"
        case "leave":
            return f"{event['why']}: the workers leave after a checkpoint"
        case "waiting":
            fit = counted(event["fit"], "worker fits", "workers fit")
            needed = counted(event["workers"], "is needed", "are needed")
            return f"{fit} the cluster now, {needed}"
        case "unstarted":
            return (
                f"no worker was heard of for {event['seconds']:.0f} s: {event['workers']} are to "
                f"start, and {event['fit']} fit the nodes that are there now; Ray waits for the "
                "others, or starts again workers that end at once (their logs are in Ray's folder)"
            )
        case "stall":
            return event["error"]
        case "hang":
            return f"{event['error']}; killing the workers, they start again"
        case "rewind":
            steps = ", ".join(map(str, event["steps"][:5]))
            return (
                f"{event['why']}; back to the newest checkpoint, and on without the batches of "
                f"steps {steps}"
            )
        case "bad_steps":
            return f"steps skipped, the gradient was not finite: {event['steps']}"
        case "not_saved":
            return f"a checkpoint was not taken by storage: {event['error']}"
        case "not_measured":
            return f"the checkpoint of step {event['step']} was not measured: {event['error']}"
        case "ledger_away":
            return "MLflow does not answer; what is logged waits"
        case "ledger_back":
            return "MLflow answers again"
    return None
