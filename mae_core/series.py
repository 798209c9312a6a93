"""The series that runs tell of: what each says, and in which unit. docs/reference/figures.md is made of it.

A step is one of the optimiser; of an evaluation and an embedding, a round of batches.
"""

SERIES = {
    "loss": "the loss of a step, the mean over its images: of a pretraining the squared error of predicted pixels (paper, section 3), "
    "else cross-entropy",
    "lr": "the learning rate of a step, before layer decay",
    "grad_norm": "the Euclidean norm of the gradient of all trained weights",
    "images_per_second": "images of all workers together, since the last exchange between them",
    "data_wait": "the share of the time, 0 to 1, that workers waited for images, on average; near 0 the images keep up, if not, raise "
    "resources.cpus_per_worker",
    "knn_accuracy": "with evaluation.labelled: the share of held-back images, 0 to 1, that k-NN classifies right by their features",
    "probe_accuracy": "the same of a linear probe",
    "val_accuracy": "fine-tuning and probes: the share of validation images, 0 to 1, that are classified right",
    "top1": "evaluations: the share of images, 0 to 1, whose likeliest class is the right one",
    "top5": "evaluations of more than five classes: the share whose right class is among the likeliest five",
    "mean_per_class": "evaluations: the mean over classes of the share that is right",
}
