"""Information: what the weights store of the training set, what a representation keeps of image and label.

Every estimate is in nats. None of them is exact, and each says in its docstring on which side it errs.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import digamma
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KDTree, NearestNeighbors
from torch import Tensor, nn
from torch.func import functional_call, jvp

from softdefend.analysis.landscape import Parameters, parameters_of
from softdefend.core.rng import key, stream
from softdefend.execution.network_mode import tf32

Matrix = NDArray[np.float64]


_ROUNDING = 1e-5
"""Of the largest standard deviation of a component, what may be rounding."""


@dataclass(frozen=True)
class WeightInformation:
    """Information in the weights by two Fisher matrices, with standard errors over the samples used."""

    empirical: float
    empirical_error: float
    model: float
    model_error: float


def information_in_weights(
    net: nn.Module, before: Parameters, image: Tensor, label: Tensor, n: int, batch_size: int
) -> WeightInformation:
    """PAC-Bayes estimate of the information that the weights w store of the n training samples (after Wang
    et al., ICLR 2022, arXiv 2109.14509): ``n / 2 (w - w0)^T F (w - w0)`` nats.

    That is KL(N(w, C) || N(w0, C)) for the covariance C = F^-1 / n that a maximum-likelihood fit has over
    bootstrap samples, F being the Fisher information of one sample. With d = w - w0 the quadratic form is
    the mean of (d . grad log p)^2 over samples, so one forward-mode pass gives it; F itself is never built.
    Two Fisher matrices: ``empirical`` squares the gradient at the given label, ``model`` averages over labels
    drawn from the network's own prediction (exactly, by its probabilities).

    Bias: for given weights the mean over drawn training images is unbiased (its standard error is returned).
    What is biased is the picture: prior and posterior are Gaussians of one covariance, F is taken at w alone,
    and the expansion from w0 to w is far from local. The number ranks networks of one architecture, size of
    training set and schedule; it is no bound. The authors' published code (993d070) does something else: it
    sums over layers the squared product of d with a *mean* gradient, without n / 2.

    Args:
        net: in eval mode.
        before: w0, by name.
        image: [m, c, h, w], of the training set.
        label: [m] int64, as given.
        n: size of the training set.
        batch_size: images in a batch.
    """
    now = parameters_of(net)
    step = {name: p - before[name].to(p) for name, p in now.items()}
    empirical, model = [], []
    with tf32(False):
        for x, y in zip(torch.split(image, batch_size), torch.split(label, batch_size), strict=True):

            def log_probability(weights: Parameters, x: Tensor = x) -> Tensor:
                logits: Tensor = functional_call(net, weights, (x,))
                return logits.float().log_softmax(dim=1)

            value, change = jvp(log_probability, (now,), (step,))[:2]
            empirical.append(change.gather(1, y[:, None]).squeeze(1).double().square())
            model.append((value.double().exp() * change.double().square()).sum(dim=1))
    return WeightInformation(*_half(torch.cat(empirical), n), *_half(torch.cat(model), n))


def _half(squares: Tensor, n: int) -> tuple[float, float]:
    m = len(squares)
    # Drawn without replacement: of the whole training set nothing is left to chance.
    error = float(squares.std()) * math.sqrt(max(0.0, 1 - m / n) / m) if m > 1 else math.nan
    return 0.5 * n * float(squares.mean()), 0.5 * n * error


def label_entropy(label: NDArray[np.int64]) -> float:
    """Plug-in entropy of labels [n], in nats."""
    share = np.bincount(label) / len(label)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def label_information_bound(features: Matrix, label: NDArray[np.int64], seed: int) -> float:
    """A variational lower bound on I(T; Y): H(Y) - CE of a classifier of y from t (Barber and Agakov, NeurIPS
    2003), nats.

    The classifier is scikit-learn's logistic regression on standardised features, fitted on one half; the
    cross-entropy is that of the other half. A third of the first half chooses the penalty: with more features
    than samples an unpenalised fit knows the labels by heart and bounds nothing.

    Bias: a lower bound in expectation, loose by the divergence between the classifier and the true
    posterior, so by all that is not log-linear; more so with few samples. May be slightly negative. H(Y) is
    plugged in from the samples.

    Args:
        features: [n, d].
        label: [n].
        seed: of the halves.
    """
    first, second = _halves(len(label), seed)
    center, scale = features[first].mean(axis=0), features[first].std(axis=0)
    x = (features - center) / np.where(scale > 1e-12, scale, 1.0)
    part = 2 * len(first) // 3
    scores = {c: _log_likelihood(x, label, first[:part], first[part:], c) for c in _PENALTIES}
    best = max(_PENALTIES, key=lambda c: -math.inf if math.isnan(scores[c]) else scores[c])
    return label_entropy(label) + _log_likelihood(x, label, first, second, best)


_PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Inverse strengths that are tried; the first where nothing can be said."""


def _log_likelihood(
    x: Matrix, label: NDArray[np.int64], fit: NDArray[np.int64], measure: NDArray[np.int64], c: float
) -> float:
    """Mean log probability of the labels at ``measure`` under a classifier fitted at ``fit``; NaN where it
    has not seen two classes, or there is none to be measured.

    One sample's worth of the distribution is even over all classes, so that one that was not seen has a
    probability too: without it the cross-entropy would be that of another distribution than the entropy.
    """
    known, classes = np.unique(label[fit]), np.unique(label)
    if len(known) < 2 or not len(measure):
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes", category=UserWarning)
        fitted = LogisticRegression(C=c, max_iter=1000).fit(x[fit], label[fit])
    place = np.searchsorted(known, label[measure]).clip(max=len(known) - 1)
    probability = fitted.predict_proba(x[measure])[np.arange(len(measure)), place]
    probability = np.where(known[place] == label[measure], probability, 0.0)
    return float(np.log((len(fit) * probability + 1 / len(classes)) / (len(fit) + 1)).mean())


def label_information_neighbors(features: Matrix, label: NDArray[np.int64], neighbors: int = 3) -> float:
    """I(T; Y) for continuous t and discrete y by nearest neighbors (Ross, PLoS ONE 2014), nats, >= 0.

    What scikit-learn's ``mutual_info_classif`` computes for one feature, here for a vector t, in the maximum
    norm.

    Bias: small in one or two dimensions; towards zero as d grows or n shrinks, since neighbors are then no
    longer near. At most about log n.

    Args:
        features: [n, d]; equally scaled columns make sense.
        label: [n]; classes of a single sample are left out.
        neighbors: k.
    """
    kinds, counts = np.unique(label, return_counts=True)
    keep = np.isin(label, kinds[counts > 1])
    x, y = _apart(features[keep]), label[keep]
    n = len(y)
    if n == 0:
        return math.nan
    radius, inside, used = np.empty(n), np.empty(n), np.empty(n)
    for kind in np.unique(y):
        members = np.flatnonzero(y == kind)
        k = min(neighbors, len(members) - 1)
        search = NearestNeighbors(n_neighbors=k, metric="chebyshev").fit(x[members])
        # just inside the k-th neighbor, so that the count below is of points strictly nearer, plus itself
        radius[members] = np.nextafter(search.kneighbors()[0][:, -1], 0)
        inside[members], used[members] = k, len(members)
    m = KDTree(x, metric="chebyshev").query_radius(x, radius, count_only=True)
    value = digamma(n) + digamma(inside).mean() - digamma(used).mean() - digamma(m).mean()
    return max(0.0, float(value))


def _apart(values: Matrix, draw: int = 0) -> Matrix:
    """Values [n, d] with noise far below their scale, as scikit-learn adds it: the estimators are made for
    points that do not coincide. Two vectors need two draws, or would depend on each other by them."""
    if not values.size:
        return values
    noise = torch.randn(
        values.shape, generator=stream(0, "analyse/ties", step=draw), dtype=torch.float64
    ).numpy()
    return values + 1e-10 * max(1.0, float(np.abs(values).mean())) * noise


def neighbor_information(a: Matrix, b: Matrix, neighbors: int = 3) -> float:
    """I(A; B) of two continuous vectors by nearest neighbors (Kraskov, Stögbauer and Grassberger, Phys. Rev.
    E 69, 2004, arXiv cond-mat/0305641, estimator 1), nats, >= 0; searches by scikit-learn.

    Bias: nearly none for independent or weakly dependent vectors of a few dimensions; far too small where
    the dependence is strong or deterministic, as that of a representation on its image is: n samples cannot
    show more than about log n.

    Args:
        a, b: [n, d] and [n, e].
        neighbors: k.
    """
    a, b = _apart(a, 0), _apart(b, 1)
    joint = np.hstack([a, b])
    distance = NearestNeighbors(n_neighbors=neighbors, metric="chebyshev").fit(joint).kneighbors()[0][:, -1]
    radius = np.nextafter(distance, 0)
    counts = [KDTree(x, metric="chebyshev").query_radius(x, radius, count_only=True) for x in (a, b)]
    value = digamma(len(a)) + digamma(neighbors) - sum(digamma(c).mean() for c in counts)
    return max(0.0, float(value))


def contrastive_information(
    a: Matrix, b: Matrix, *, seed: int, steps: int = 300, batch: int = 128, width: int = 64
) -> float:
    """InfoNCE, a variational lower bound on I(A; B) (van den Oord et al., arXiv 1807.03748; Poole et al.,
    ICML 2019, arXiv 1905.06922), nats.

    The critic is an inner product of two small networks, one for each vector. Half of the pairs train it, a
    quarter chooses the step, the last quarter gives the estimate, so that neither training nor choosing
    flatters it.

    Bias: a lower bound in expectation, of at most log(batch), here and in any batch of the last quarter;
    loose where the critic has learnt too little from few pairs. May be slightly negative.

    Args:
        a, b: [n, d] and [n, e], n >= 16, about zero mean and unit scale.
        seed: of split, initial critic and batches.
        steps: of training.
        batch: pairs in a contrast.
        width: of the critic's hidden layers.
    """
    n = len(a)
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).float() for v in (a, b))
    order = torch.randperm(n, generator=stream(seed, "analyse/contrast"))
    train, choose, test = order[: n // 2], order[n // 2 : 3 * n // 4], order[3 * n // 4 :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "analyse/critic"))
        critic = nn.ModuleList(_tower(v.shape[1], width) for v in (x, y))
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, weight_decay=1e-4)
    draws = stream(seed, "analyse/contrast", step=1)
    best, estimate = -math.inf, 0.0
    for step in range(steps):
        rows = train[torch.randperm(len(train), generator=draws)[:batch]]
        optimizer.zero_grad()
        with torch.enable_grad():
            (-_info_nce(critic, x[rows], y[rows])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 10 == 9 or step == steps - 1:
            value = _batched(critic, x[choose], y[choose], batch)
            if value > best:
                best, estimate = value, _batched(critic, x[test], y[test], batch)
    return estimate


def _tower(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 32)
    )


def _info_nce(critic: nn.ModuleList, x: Tensor, y: Tensor) -> Tensor:
    scores: Tensor = critic[0](x) @ critic[1](y).T
    return scores.diagonal().mean() - scores.logsumexp(dim=1).mean() + math.log(len(x))


@torch.no_grad()
def _batched(critic: nn.ModuleList, x: Tensor, y: Tensor, batch: int) -> float:
    """Mean over equal contrasts: a smaller one would have a lower cap."""
    size = min(batch, len(x))
    whole = len(x) // size * size
    pairs = zip(torch.split(x[:whole], size), torch.split(y[:whole], size), strict=True)
    values = [float(_info_nce(critic, u, v)) for u, v in pairs]
    return sum(values) / len(values)


def _halves(n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = torch.randperm(n, generator=stream(seed, "analyse/halves")).numpy()
    return order[: n // 2], order[n // 2 :]


def reduced(values: Matrix, components: int) -> Matrix:
    """The first principal components of rows [n, d], each scaled to unit variance: [n, at most components].

    A function of the vector, so it can only lose information (data processing inequality). Left out are
    components that float32 cannot tell from rounding, which unit variance would make as loud as the others.
    """
    if not np.ptp(values, axis=0).any():
        return np.zeros((len(values), 1))
    count = min(components, *values.shape)
    # the full solver draws no random numbers
    pca = PCA(count, svd_solver="full")
    projected = pca.fit_transform(values)
    spread = np.sqrt(pca.explained_variance_)
    distinct = spread > _ROUNDING * spread[0]
    return np.asarray(projected[:, distinct] / spread[distinct], dtype=np.float64)


def mutual_information(
    image: Tensor,
    features: Tensor,
    label: Tensor,
    *,
    components: int,
    neighbors: int,
    contrast_steps: int,
    seed: int,
) -> dict[str, float]:
    """I(T; Y) and I(X; T) of images [n, c, h, w], features [n, d] and labels [n], two estimators each."""
    t = features.double().cpu().numpy()
    y = label.cpu().numpy()
    small_t = reduced(t, components)
    small_x = reduced(image.double().cpu().flatten(1).numpy(), components)
    return {
        "label_entropy": label_entropy(y),
        "label_bound": label_information_bound(t, y, seed),
        "label_neighbors": label_information_neighbors(small_t, y, neighbors),
        "input_bound": contrastive_information(small_x, small_t, seed=seed, steps=contrast_steps),
        "input_neighbors": neighbor_information(small_x, small_t, neighbors),
    }
