"""The ClientApp."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.metrics import log_loss

from sklearnexample.task import CLASSES, fit, load_data, new_model, set_parameters

app = ClientApp()


def arrived(msg: Message, context: Context):
    """Return the model that came, and this node's examples."""
    model = new_model(context.run_config["local-iterations"])
    set_parameters(model, msg.content["arrays"].to_numpy_ndarrays())
    return model, *load_data(context.node_config["partition-id"], context.node_config["num-partitions"])


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the model on local data."""
    model, examples, _ = arrived(msg, context)
    fit(model, examples)
    loss = log_loss(examples[1], model.predict_proba(examples[0]), labels=list(range(CLASSES)))
    metrics = MetricRecord({"num-examples": len(examples[0]), "train_logloss": loss})
    content = RecordDict({"arrays": ArrayRecord([model.coef_, model.intercept_]), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the model on local data."""
    model, _, examples = arrived(msg, context)
    metrics = MetricRecord({"num-examples": len(examples[0]), "test_accuracy": model.score(*examples)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
