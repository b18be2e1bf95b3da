"""Codes and rows are each other's inverse; counts, however noisy, give a distribution; exact counts give the truth."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen_models.schema import Column, Factor, Instance, PatientBatch, Schema, Slot
from medgen_models.table_bins import project_to_simplex
from medgen_models.table_margins import shrink_singular_values
from medgen_models.table_prior import (
    PairModel,
    TreeModel,
    all_queries,
    choose_pairs,
    count_tables,
    decode_rows,
    default_queries,
    encode_rows,
    fit,
    fit_pairs,
    mutual_information,
    public_positions,
    variables,
)

CUBE = {"shape": (2, 2, 2), "voxel_mm": (1.0, 1.0, 1.0)}


def toy_schema(visits: int = 1) -> Schema:
    sequence = Factor(name="sequence", levels=("T1w", "T2w", "FLAIR"))
    disease = Factor(name="disease", levels=("healthy", "ill"), column="disease")
    tracer = Factor(name="tracer", levels=("FDG", "AV45"))
    return Schema(
        name="toy",
        max_visits=visits,
        slots=(
            Slot(name="mri", kind="volume", codec="atlas", instances=(Instance(name="a"), Instance(name="b")),
                 factors=(sequence, disease), **CUBE),
            Slot(name="pet", kind="volume", codec="atlas", instances=(Instance(name="fdg", fixed={"tracer": "FDG"}),),
                 factors=(tracer,), **CUBE),
            Slot(name="cxr", kind="image", codec="atlas", shape=(2, 2), voxel_mm=(1.0, 1.0),
                 instances=(Instance(name="current"), Instance(name="prior", role="reference", of="cxr.current"))),
            Slot(name="ehr", kind="table", codec="table", columns=(
                Column(name="age", low=20, high=100, unit="years"),
                Column(name="disease", kind="categorical", categories=("ill", "healthy")),
                Column(name="died", kind="categorical", categories=("no", "yes"), outcome=True))),
            Slot(name="vitals", kind="series", codec="series", columns=(Column(name="hr", high=200),), hours=4, bin_hours=2),
        ),
    )  # fmt: skip


SCHEMA = toy_schema()
NAMES = ("age", "disease", "died", "@mri.a", "@mri.b", "@pet.fdg", "@cxr.current", "@cxr.prior", "@vitals")


def random_codes(domain: tuple[int, ...], patients: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, levels, patients) for levels in domain], axis=1)


# --- rows and codes


def test_the_vocabulary_follows_from_the_schema() -> None:
    columns = variables(SCHEMA, 4)
    assert tuple(v.name for v in columns) == NAMES
    assert columns[0].levels == ("20 to 40", "40 to 60", "60 to 80", "80 to 100", "missing")
    assert columns[1].levels == ("ill", "healthy", "missing")
    assert columns[3].levels == ("absent", "T1w", "T2w", "FLAIR")
    assert columns[5].levels == ("absent", "present")
    with pytest.raises(ValueError, match="bins"):
        variables(SCHEMA, 0)


@settings(max_examples=30, deadline=None)
@given(bins=st.integers(1, 64), seed=st.integers(0, 2**32 - 1), parts=st.sampled_from([0, 3]))
def test_decoded_codes_encode_to_themselves(bins: int, seed: int, parts: int) -> None:
    domain = tuple(len(v.levels) for v in variables(SCHEMA, bins))
    codes = random_codes(domain, 40, seed)
    codes[3] = -1
    codes[5, 3] = -1
    rng = np.random.default_rng(seed)
    positions = rng.dirichlet(np.ones(parts), (3, bins)) if parts else None
    batch = decode_rows(SCHEMA, codes, bins, rng, positions)
    again = encode_rows(SCHEMA, batch, bins)
    assert again.domain == domain
    np.testing.assert_array_equal(again.codes_BC, codes)


def test_a_decoded_row_sets_presence_factors_gap_and_values() -> None:
    #        age disease died a b fdg current prior vitals
    codes = np.array([[3, 0, 2, 2, 0, 1, 1, 1, 0], [4, 2, 2, 0, 0, 0, 0, 0, 1]])
    batch = decode_rows(SCHEMA, codes, 4, np.random.default_rng(0), gap_hours=(5.0, 6.0))
    keys, factors = SCHEMA.keys(), [f.name for f in SCHEMA.factors()]
    present = {k for k in keys if batch.present_BVI[0, 0, keys.index(k)]}
    assert present == {"mri.a", "pet.fdg", "cxr.current", "cxr.prior", "ehr"}
    level = {(k, f): int(batch.factor_BVIF[0, 0, keys.index(k), factors.index(f)]) for k in keys for f in factors}
    # T2w is the second sequence; "ill" is the first category but the second level of the factor; FDG is fixed
    assert {pair: n for pair, n in level.items() if n} == {
        ("mri.a", "sequence"): 2, ("mri.a", "disease"): 2, ("pet.fdg", "tracer"): 1,
    }  # fmt: skip
    assert 5.0 <= float(batch.gap_hours_BVI[0, 0, keys.index("cxr.prior")]) <= 6.0
    assert float(batch.gap_hours_BVI.sum()) == float(batch.gap_hours_BVI[0, 0, keys.index("cxr.prior")])
    age, disease, died = batch.values["ehr"][0, 0].tolist()
    assert 0.5 < age < 1.0
    assert disease == 0.0
    assert np.isnan(died)
    # a row without any value is a table that is not there
    assert not batch.present_BVI[1, 0, keys.index("ehr")]
    assert batch.visit_BV.all()
    assert torch.isnan(batch.values["vitals"]).all()
    assert not batch.values["mri.a"].any()


def test_null_patients_unknown_levels_and_odd_values_never_fail() -> None:
    batch = PatientBatch.empty(SCHEMA, 4)
    keys = SCHEMA.keys()
    batch.visit_BV[1:] = True
    batch.present_BVI[1:, 0, keys.index("ehr")] = True
    batch.present_BVI[1, 0, keys.index("mri.a")] = True  # sequence not noted
    batch.values["ehr"][1, 0] = torch.tensor([float("inf"), 7.0, float("nan")])
    batch.values["ehr"][2, 0] = torch.tensor([1.0, -3.0, 1.0])
    batch.values["ehr"][3, 0] = torch.tensor([-1.0, 0.0, 0.0])
    batch.present_BVI[3, 0, keys.index("ehr")] = False
    codes = encode_rows(SCHEMA, batch, 4).codes_BC
    assert (codes[0] == -1).all()
    assert codes[1].tolist() == [4, 2, 2, -1, 0, 0, 0, 0, 0]  # 7 is no category of a column without "other": missing
    assert codes[2].tolist() == [3, 2, 1, 0, 0, 0, 0, 0, 0]
    assert codes[3].tolist() == [4, 2, 2, 0, 0, 0, 0, 0, 0]
    assert encode_rows(SCHEMA, batch.select([]), 4).codes_BC.shape == (0, len(NAMES))


def test_numbers_of_no_category_are_other_where_the_study_has_such_a_category() -> None:
    columns = (Column(name="ward", kind="categorical", categories=("other", "surgery")),)
    schema = Schema(name="one", slots=(Slot(name="ehr", kind="table", codec="table", columns=columns),))
    batch = PatientBatch.empty(schema, 4)
    batch.visit_BV[:] = batch.present_BVI[:] = True
    batch.values["ehr"][:, 0, 0] = torch.tensor([1.0, 5.0, -1.0, float("nan")])
    assert encode_rows(schema, batch, 4).codes_BC[:, 0].tolist() == [1, 0, 0, 2]


def test_the_first_visit_that_exists_is_coded() -> None:
    schema = toy_schema(visits=3)
    batch = PatientBatch.empty(schema, 1)
    batch.visit_BV[0, 1:] = True
    batch.present_BVI[0, 1:, schema.keys().index("ehr")] = True
    batch.values["ehr"][0, 1, 1], batch.values["ehr"][0, 2, 1] = 1.0, 0.0
    assert encode_rows(schema, batch, 4).codes_BC[0, 1] == 1
    decoded = decode_rows(schema, np.zeros((2, len(NAMES)), np.int64), 4, np.random.default_rng(0))
    assert decoded.visit_BV.tolist() == [[True, False, False]] * 2


def test_codes_outside_the_vocabulary_are_refused() -> None:
    codes = np.zeros((1, len(NAMES)), np.int64)
    codes[0, 0] = 9
    with pytest.raises(ValueError, match="age: code 9 of 5"):
        decode_rows(SCHEMA, codes, 4, np.random.default_rng(0))
    with pytest.raises(ValueError, match="shape"):
        decode_rows(SCHEMA, codes[:, :3], 4, np.random.default_rng(0))


def test_public_positions_give_a_skewed_column_its_shape_back() -> None:
    rng = np.random.default_rng(0)
    batch = PatientBatch.empty(SCHEMA, 4000)
    batch.visit_BV[:] = True
    batch.present_BVI[:, 0, SCHEMA.keys().index("ehr")] = True
    values = np.clip(rng.exponential(0.08, 4000), 0, 2) - 1.0
    batch.values["ehr"][:, 0, 0] = torch.from_numpy(values.astype(np.float32))
    codes = encode_rows(SCHEMA, batch, 4).codes_BC
    flat = decode_rows(SCHEMA, codes, 4, rng).values["ehr"][:, 0, 0].numpy()
    positions = public_positions(SCHEMA, batch, 4)
    shaped = decode_rows(SCHEMA, codes, 4, rng, positions).values["ehr"][:, 0, 0].numpy()
    np.testing.assert_allclose(positions.sum(axis=2), 1.0)
    grid = np.linspace(-1, 1, 200)

    def distance(sample: np.ndarray) -> float:
        return float(np.abs((sample[:, None] <= grid).mean(0) - (values[:, None] <= grid).mean(0)).max())

    assert distance(flat) > 0.4
    assert distance(shaped) < 0.3


# --- which tables


def test_default_queries_hold_every_column_and_at_most_two_tables_a_column() -> None:
    domain = encode_rows(SCHEMA, PatientBatch.empty(SCHEMA, 0), 4).domain
    queries = default_queries(SCHEMA, domain)
    assert queries[: len(domain)] == tuple((c,) for c in range(len(domain)))
    pairs = queries[len(domain) :]
    assert len(set(queries)) == len(queries) <= 2 * len(domain)
    assert all(a < b < len(domain) for a, b in pairs)
    named = {(NAMES[a], NAMES[b]) for a, b in pairs}
    assert {("@mri.a", "@mri.b"), ("@cxr.current", "@cxr.prior"), ("age", "died"), ("disease", "@mri.a")} <= named
    assert default_queries(SCHEMA, domain, [(0, 2)])[-1] == (0, 2)
    with pytest.raises(ValueError, match="pair"):
        default_queries(SCHEMA, domain, [(2, 0)])
    with pytest.raises(ValueError, match="columns"):
        default_queries(SCHEMA, domain[:-1])


def test_choose_pairs_finds_the_dependent_columns_first() -> None:
    rng = np.random.default_rng(1)
    a, b, c = rng.integers(0, 3, 3000), rng.integers(0, 2, 3000), rng.integers(0, 4, 3000)
    near = np.where(rng.random(3000) < 0.9, a, rng.integers(0, 3, 3000))
    weak = np.where(rng.random(3000) < 0.5, b, rng.integers(0, 2, 3000))
    codes, domain = np.stack([a, b, c, near, weak], axis=1), (3, 2, 4, 3, 2)
    assert choose_pairs(codes, domain, 2) == ((0, 3), (1, 4))
    assert len(choose_pairs(codes, domain, 99)) == 10
    assert choose_pairs(codes, domain, 0) == ()
    assert choose_pairs(codes[:0], domain, 1) == ((0, 1),)


def test_mutual_information_by_hand() -> None:
    table = np.array([[0.25, 0.25], [0.0, 0.5]])
    # sum p log(p / (row * column)): .25 log(.25/.125) + .25 log(.25/.375) + .5 log(.5/.375)
    assert mutual_information(table) == pytest.approx(0.25 * np.log(2) + 0.25 * np.log(2 / 3) + 0.5 * np.log(4 / 3))
    assert mutual_information(np.outer([1, 2], [3, 4, 5])) == pytest.approx(0.0, abs=1e-12)


# --- fit and sample


def truth(patients: int, seed: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """A chain 0 -> 1 -> 2 and a lone column 3."""
    rng = np.random.default_rng(seed)
    first = rng.choice(3, patients, p=[0.5, 0.3, 0.2])
    second = np.where(rng.random(patients) < 0.8, first, rng.integers(0, 3, patients))
    third = np.where(rng.random(patients) < 0.7, second > 0, rng.integers(0, 2, patients)).astype(np.int64)
    return np.stack([first, second, third, rng.choice(2, patients, p=[0.9, 0.1])], axis=1), (3, 3, 2, 2)


QUERIES = (*((c,) for c in range(4)), *itertools.combinations(range(4), 2))


def noised(counts: dict, std: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {query: table + std * rng.normal(size=table.shape) for query, table in counts.items()}


def test_exact_counts_give_the_tree_and_its_exact_tables() -> None:
    codes, domain = truth(20_000, 0)
    counts = count_tables(codes, domain, QUERIES)
    model = fit(counts, domain, smoothing=0.0)
    assert model.parent[:3] == (-1, 0, 1)
    assert model.patients == pytest.approx(20_000)
    np.testing.assert_allclose(model.tables[0], counts[(0,)] / 20_000, atol=1e-9)
    np.testing.assert_allclose(model.tables[1], counts[(0, 1)] / counts[(0,)][:, None], atol=1e-9)
    for c, share in enumerate(model.one_way()):
        np.testing.assert_allclose(share, counts[(c,)] / 20_000, atol=1e-9)


def test_the_tree_is_the_maximum_spanning_tree() -> None:
    codes, domain = truth(5_000, 3)
    counts = count_tables(codes, domain, QUERIES)
    model = fit(counts, domain)
    weight = {pair: mutual_information(counts[pair]) for pair in itertools.combinations(range(4), 2)}
    trees = [t for t in itertools.combinations(weight, 3) if len(set(itertools.chain(*t))) == 4 and spans(t)]
    assert sum(model.information) == pytest.approx(max(sum(weight[p] for p in t) for t in trees), rel=1e-6)


def spans(edges: tuple) -> bool:
    group = {c: c for c in range(4)}
    for a, b in edges:
        group = {c: (group[a] if g == group[b] else g) for c, g in group.items()}
    return len(set(group.values())) == 1


def test_samples_have_the_models_distribution() -> None:
    codes, domain = truth(4_000, 1)
    model = fit(count_tables(codes, domain, QUERIES), domain)
    drawn = model.sample(40_000, np.random.default_rng(2))
    shares = count_tables(drawn, domain, QUERIES)
    for c, expected in enumerate(model.one_way()):
        np.testing.assert_allclose(shares[(c,)] / 40_000, expected, atol=0.01)
    np.testing.assert_allclose(shares[(0, 1)] / 40_000, model.tables[0][:, None] * model.tables[1], atol=0.01)
    np.testing.assert_array_equal(drawn[:50], model.sample(40_000, np.random.default_rng(2))[:50])
    assert model.sample(0, np.random.default_rng(0)).shape == (0, 4)


def test_the_likelihood_sums_to_one_over_all_rows_and_favours_the_truth() -> None:
    codes, domain = truth(4_000, 1)
    model = fit(count_tables(codes, domain, QUERIES), domain)
    every = np.array(list(itertools.product(*(range(n) for n in domain))))
    assert np.exp(model.log_likelihood(every)).sum() == pytest.approx(1.0)
    assert np.isfinite(model.log_likelihood(every)).all()
    shuffled = np.stack([np.random.default_rng(c).permutation(codes[:, c]) for c in range(4)], axis=1)
    assert model.log_likelihood(codes).mean() > model.log_likelihood(shuffled).mean() + 0.3
    assert np.isnan(model.log_likelihood(np.array([[-1, -1, -1, -1], [3, 0, 0, 0]]))).all()


def test_noise_alone_is_taken_for_independence() -> None:
    """Whatever 200 patients did, counts under noise of 1000 must not invent dependence or a favourite level."""
    codes, domain = truth(200, 5)
    counts = count_tables(codes, domain, QUERIES)
    edges, spread = [], []
    for seed in range(30):
        model = fit(noised(counts, 1000.0, seed), domain)
        edges.append(sum(parent >= 0 for parent in model.parent))
        spread.append(model.one_way()[0].max())
        assert all((table >= 0).all() and np.allclose(table.sum(-1), 1) for table in model.tables)
    assert np.mean(edges) < 1.5  # of 3 possible; without shrinking it is 3 every time
    assert np.median(spread) < 0.75


def test_moderate_noise_keeps_strong_dependence_and_beats_the_raw_counts() -> None:
    codes, domain = truth(1_000, 6)
    counts = count_tables(codes, domain, QUERIES)
    ours, raw = [], []
    for seed in range(20):
        noisy = noised(counts, 25.0, seed)
        model = fit(noisy, domain)
        joint = counts[(0, 1)] / 1000
        assert model.parent[1] == 0
        ours.append(np.abs(model.tables[0][:, None] * model.tables[1] - joint).sum())
        raw.append(np.abs(np.maximum(noisy[(0, 1)], 0) / np.maximum(noisy[(0, 1)], 0).sum() - joint).sum())
    assert np.mean(ours) < 0.8 * np.mean(raw)


def test_what_noise_hides_looks_like_the_public_population_and_what_it_does_not_hide_stays_private() -> None:
    public_codes, domain = truth(2_000, 7)
    public = count_tables(public_codes, domain, QUERIES)
    private_codes = public_codes.copy()
    private_codes[:, 3] = np.random.default_rng(0).choice(2, 2_000, p=[0.3, 0.7])
    counts = count_tables(private_codes, domain, QUERIES)
    hidden = fit(noised(counts, 3e5, 0), domain, public=public)
    np.testing.assert_allclose(hidden.tables[1], public[(0, 1)] / public[(0,)][:, None], atol=0.25)
    seen = fit(noised(counts, 10.0, 0), domain, public=public)
    np.testing.assert_allclose(seen.one_way()[3], [0.3, 0.7], atol=0.03)
    only_public = fit({}, domain, public=public)
    np.testing.assert_allclose(only_public.one_way()[3], public[(3,)] / 2_000, atol=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda rng, shape: np.zeros(shape),
        lambda rng, shape: -np.abs(rng.normal(size=shape)) * 1e6,
        lambda rng, shape: rng.normal(size=shape) * 1e9,
        lambda rng, shape: np.eye(1, int(np.prod(shape))).reshape(shape),
        lambda rng, shape: np.full(shape, 1e-300),
    ],
    ids=["zero", "negative", "noise", "one patient", "tiny"],
)
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_any_finite_counts_give_a_distribution(make, smoothing: float) -> None:
    rng = np.random.default_rng(0)
    domain = (3, 1, 5, 2)  # a column of one level included
    counts = {q: make(rng, tuple(domain[c] for c in q)) for q in QUERIES}
    model = fit(counts, domain, smoothing)
    for table in model.tables:
        assert np.isfinite(table).all()
        assert (table >= 0).all()
        np.testing.assert_allclose(table.sum(axis=-1), 1.0)
    drawn = model.sample(20, rng)
    assert ((drawn >= 0) & (drawn < np.asarray(domain))).all()
    if smoothing:
        assert np.isfinite(model.log_likelihood(drawn)).all()


def test_columns_without_a_table_are_uniform_and_bad_tables_are_named() -> None:
    model = fit({(0,): np.array([3.0, 1.0])}, (2, 4), smoothing=0.0)
    np.testing.assert_allclose(model.tables[0], [0.75, 0.25])
    np.testing.assert_allclose(model.tables[1], 0.25)
    # a table may be given in either order of its columns
    table = np.arange(8.0).reshape(2, 4)
    a, b = fit({(0, 1): table}, (2, 4)), fit({(1, 0): table.T}, (2, 4))
    np.testing.assert_allclose(a.tables[1], b.tables[1])
    for counts, match in [
        ({(0,): np.zeros(3)}, "shape"),
        ({(0,): np.array([1.0, np.nan])}, "finite"),
        ({(0, 0): np.zeros((2, 2))}, "distinct"),
        ({(0, 5): np.zeros((2, 2))}, "distinct"),
        ({(0, 1): table, (1, 0): table.T}, "twice"),
    ]:
        with pytest.raises(ValueError, match=match):
            fit(counts, (2, 4))
    with pytest.raises(ValueError, match="1 level"):
        fit({}, (0,))


def test_the_model_survives_json_and_a_torn_one_is_refused() -> None:
    codes, domain = truth(500, 2)
    model = fit(count_tables(codes, domain, QUERIES), domain)
    again = TreeModel.from_dict(json.loads(json.dumps(model.to_dict())))
    np.testing.assert_array_equal(
        again.sample(99, np.random.default_rng(1)), model.sample(99, np.random.default_rng(1))
    )
    assert again.parent == model.parent
    for change in (
        {"parent": [1, 0, 1, -1]},
        {"parent": [9, 0, 1, -1]},
        {"domain": [3, 3, 2]},
        {"domain": [4, 3, 2, 2]},
    ):
        with pytest.raises(ValueError, match=r"cycle|torn|no column|no table|fit it again"):
            TreeModel.from_dict({**model.to_dict(), **change})


def test_simplex_projection_is_the_nearest_point() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        point = rng.normal(size=4) * 2
        nearest = project_to_simplex(point)
        assert nearest.sum() == pytest.approx(1.0)
        assert (nearest >= 0).all()
        others = rng.dirichlet(np.ones(4) * 0.5, 200)
        assert (((others - point) ** 2).sum(1) >= ((nearest - point) ** 2).sum() - 1e-9).all()
    np.testing.assert_allclose(project_to_simplex(np.array([-5.0, -5.0])), [0.5, 0.5])


def test_singular_value_shrinkage_removes_noise_and_keeps_signal() -> None:
    rng = np.random.default_rng(0)
    signal = np.outer(np.linspace(-1, 1, 9), np.linspace(-2, 2, 9)) * 10
    noise = rng.normal(size=(9, 9))
    noise = noise - noise.mean(0) - noise.mean(1)[:, None] + noise.mean()
    kept = shrink_singular_values(signal + noise, 1.0)
    assert np.linalg.norm(kept - signal) < 0.6 * np.linalg.norm(noise)
    assert np.linalg.norm(shrink_singular_values(noise, 1.0)) < 0.35 * np.linalg.norm(noise)
    np.testing.assert_array_equal(shrink_singular_values(signal, 0.0), signal)
    # 2 x 2: one free value; y = 4 gives sqrt((16 - 2)^2 - 4) / 4
    pattern = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert np.linalg.norm(shrink_singular_values(2 * pattern, 1.0)) == pytest.approx(np.sqrt(14**2 - 4) / 4)


# --- pair models: all measured tables, not the tree's alone


def test_a_pair_model_has_the_pairs_that_the_tree_has_no_room_for() -> None:
    # three columns that agree with each other by pairs: a tree has two of the three pairs, and the third follows as .8 * .8
    rng = np.random.default_rng(3)
    hidden = rng.integers(0, 2, 40_000)
    codes = np.stack([np.where(rng.random(40_000) < 0.8, hidden, 1 - hidden) for _ in range(3)], axis=1)
    queries = all_queries((2, 2, 2))
    counts = count_tables(codes, (2, 2, 2), queries)
    model = fit_pairs(counts, (2, 2, 2))
    drawn = model.sample(8000, np.random.default_rng(0))
    chained = fit(counts, (2, 2, 2)).sample(8000, np.random.default_rng(0))
    pairs = [(0, 1), (0, 2), (1, 2)]
    agree, in_tree, true = (
        np.array([(rows[:, a] == rows[:, b]).mean() for a, b in pairs]) for rows in (drawn, chained, codes)
    )
    np.testing.assert_allclose(true, 0.68, atol=0.02)
    np.testing.assert_allclose(agree, true, atol=0.02)
    assert in_tree.min() == pytest.approx(0.5 + 2 * 0.18**2, abs=0.02)


def test_weights_on_a_complete_pool_solve_a_known_case() -> None:
    # from an even tree over two bits to the joint [[.4, .1], [.1, .4]]: each cell's weight is its share
    tree = fit({}, (2, 2))
    model = PairModel(tree, {(0, 1): np.array([[0.4, 0.1], [0.1, 0.4]])})
    weights = model.weights(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    np.testing.assert_allclose(weights, [0.4, 0.1, 0.1, 0.4])


def test_pairs_that_contradict_each_other_still_give_rows() -> None:
    same, other = np.array([[0.5, 0.0], [0.0, 0.5]]), np.array([[0.0, 0.5], [0.5, 0.0]])
    model = PairModel(fit({}, (2, 2, 2)), {(0, 1): same, (1, 2): same, (0, 2): other})
    rows = model.sample(500, np.random.default_rng(0))
    assert rows.shape == (500, 3)
    assert model.sample(0, np.random.default_rng(0)).shape == (0, 3)
    assert len(np.unique(rows, axis=0)) > 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.sampled_from([0.0, 5.0, 500.0]))
def test_a_pair_model_of_any_counts_draws_from_the_domain_and_repeats_with_its_seed(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    domain = (3, 2, 4)
    codes = random_codes(domain, 100, seed)
    exact = count_tables(codes, domain, all_queries(domain))
    model = fit_pairs({q: t + noise * rng.standard_normal(t.shape) for q, t in exact.items()}, domain)
    first, again = (model.sample(50, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert ((first >= 0) & (first < np.asarray(domain))).all()
