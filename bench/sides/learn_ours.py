"""`overhaul learn bregman` by its library, one task a turn."""

from typing import Any

import torch
import turn

from overhaul import artifact, machine
from overhaul.kinds import Kind
from overhaul.learn.bregman import Bregman
from overhaul.task_data import TaskData
from overhaul.task_scores import Scores
from overhaul.tasks import open_tasks
from overhaul.train import train
from overhaul.workspace import finish

given = turn.settings()
torch.set_num_threads(1)
terms: dict[str, Any] = {
    # The peer too has batch and memory in one pass.
    "der++": {"output_term": "der++", "passes": "joined"},
    # The peer too takes gradients at the labels that are given, of whole batches; here they are of single examples.
    "ewc": {"output_term": "none", "weight_term": "ewc", "fisher": "empirical"},
}[given["method"]]
names = ("batch_size", "lr", "memory", "alpha", "label_weight", "beta")
how: dict[str, Any] = {name: given[name] for name in names if name in given}
if "refresh" in given:
    how |= {"refresh": given["refresh"], "fisher": "empirical"}
# The peer does not clip.
method = Bregman(**how, **terms, epochs=1.0, clip=0.0, save_every=0)

turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
made = artifact.load(given["model"], kinds=(Kind.IMAGE_CLASSIFIER,))
data = TaskData(open_tasks(["fashion-mnist"], split=given["num_tasks"]), made.processor, 1)
images = [len(examples) for examples in data.train]
machine.seed_everything(0)
made.model.to(memory_format=torch.channels_last)  # pyright: ignore - as `method.stages` has it
learner, scores = method.learner(made.model, data), Scores(data)
turn.tell()

for number in range(given["num_tasks"]):
    turn.wait()
    learner.begin(number)
    plan = learner.plan(number)
    train(plan, method, quiet=True)
    finish(plan)
    learner.learnt(number)
    turn.tell(images=images[number])

turn.wait()
scores.take(learner.right, given["num_tasks"])
accuracies = scores.rows["class-IL"][-1]
turn.tell(accuracy=sum(accuracies) / len(accuracies))
turn.wait()
