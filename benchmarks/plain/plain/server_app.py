"""The ServerApp: FedAvg without changes."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from plain.task import load_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Average the adapter over all rounds."""
    arrays = ArrayRecord(get_peft_model_state_dict(load_model(context.run_config)))
    FedAvg().start(grid, arrays, num_rounds=int(context.run_config["rounds"]))
