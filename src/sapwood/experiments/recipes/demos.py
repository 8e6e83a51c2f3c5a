"""Recipes for a machine without a GPU."""

from __future__ import annotations

import dataclasses

from sapwood.experiments.grid import Grid
from sapwood.experiments.recipes.paper import ntk_sap, shuffled
from sapwood.experiments.recipes.recipe import Recipe
from sapwood.training import TrainConfig

FAITHFUL = "ntk-sap-analytic"
LOW_NOISE = "ntk-sap-analytic@epsilon=0,noise=lognormal"
FLAT = f"{LOW_NOISE},positions=flat"


def digits() -> Recipe:
    """What `sapwood compare` does without flags."""
    return Recipe(
        name="digits",
        about="Six methods on scikit-learn's 8x8 digits with ResNet-8, in two minutes.",
        source="Sapwood's demo; no published numbers",
        grid=Grid(),
        train=TrainConfig(epochs=5, batch_size=64, lr=0.1, schedule="one-cycle", milestones=()),
    )


def cifar10_laptop() -> Recipe:
    """CIFAR-10 at a quarter of its pixels."""
    methods = ("ntk-sap", shuffled("ntk-sap"), "synflow", "snip", "grasp", "magnitude", "erk", "random")
    return Recipe(
        name="cifar10-laptop",
        about="CIFAR-10 at 16x16 pixels with ResNet-20 at high sparsity, within an hour on two CPU cores.",
        source="Sapwood's own; no published numbers",
        grid=Grid(
            data="cifar10", model="resnet20", methods=methods, sparsities=(0.956, 0.982), seeds=(0, 1, 2), resolution=16
        ),
        train=TrainConfig(epochs=2, lr=0.1, schedule="one-cycle", milestones=(), weight_decay=5e-4, channels_last=True),
        notes=(
            "Two epochs are far from a full training: its methods compare with each other, and with nothing else.",
            "The network is the paper's, with all of its 270,896 weights; images are averaged down from 32x32 pixels, "
            "for pruning and for training alike.",
        ),
    )


def closed_form() -> Recipe:
    """Is NTK-SAP's closed form as good as its Monte-Carlo estimator? Shares the runs of `cifar10_laptop`."""
    laptop = cifar10_laptop()
    controls = (shuffled("ntk-sap"), FAITHFUL, LOW_NOISE, FLAT)
    grid = dataclasses.replace(
        laptop.grid,
        methods=("ntk-sap", *controls, "synflow", "snip", "grasp", "erk", "random"),
        seeds=(0, 1, 2, 3, 4),
    )
    return dataclasses.replace(
        laptop,
        name="closed-form",
        about="NTK-SAP's closed form in three modes beside the published estimator and its shuffled masks; five seeds.",
        grid=grid,
        notes=(
            "The three modes: ntk-sap-analytic is faithful (epsilon as published, chi-square noise), "
            "epsilon=0,noise=lognormal is low-noise, positions=flat also ignores the borders of maps.",
            "Every mask is drawn afresh for every seed.",
            *laptop.notes,
        ),
    )


def closed_form_vgg16() -> Recipe:
    """What decides in VGG-16's masks: layers, kernel taps or single weights?"""
    published = ntk_sap(samples=20)
    return Recipe(
        name="closed-form-vgg16",
        about="VGG-16 under NTK-SAP's masks, shuffled inside layers and inside kernel taps, and the closed form's.",
        source="Sapwood's own; no published numbers",
        grid=Grid(
            data="cifar10",
            model="vgg16-bn",
            methods=(published, shuffled(published), f"{published},control=shuffle-taps", FAITHFUL),
            sparsities=(0.982,),
            seeds=(0, 1, 2, 3, 4),
        ),
        train=TrainConfig(
            epochs=1, batch_size=64, lr=0.1, schedule="one-cycle", milestones=(), share=0.2, channels_last=True
        ),
        notes=(
            "One epoch of a fifth of the training images, 157 steps: VGG-16 needs 32x32 pixels and takes a minute for "
            "4,000 of them on a CPU core.",
            "samples=20: the published five draws of weights a round, with 20 inputs each instead of 100, for time.",
        ),
    )
