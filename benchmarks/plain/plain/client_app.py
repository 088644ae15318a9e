"""The ClientApp: every message loads the model, trains or evaluates, and replies."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from plain.task import evaluate, load_batches, load_model, train

app = ClientApp()


def _model(message: Message, context: Context):
    model = load_model(context.run_config)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    return model


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train on this site's rows."""
    model = _model(message, context)
    batches = load_batches(str(context.node_config["train"]))
    loss = train(model, batches, int(context.run_config["steps"]))
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"loss": loss, "num-examples": len(batches)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    """Evaluate the global adapter on this site's rows."""
    model = _model(message, context)
    batches = load_batches(str(context.node_config["test"]))
    metrics = MetricRecord({"accuracy": evaluate(model, batches), "num-examples": len(batches)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
