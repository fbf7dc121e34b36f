use super::*;
use crate::mapping::{AffineMap, MappingQuality};
use crate::tensor::LayerIndex;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const ROWS_A_DOCUMENT: usize = 6;

/// Rows of two models, `y = x·truth + noise`, with dimensions of very different sizes and offsets.
struct Synthetic {
    source_width: usize,
    target_width: usize,
    source: Vec<f32>,
    target: Vec<f32>,
    documents: Vec<u32>,
}

impl Synthetic {
    fn new(n: usize, source_width: usize, target_width: usize, noise: f64, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f64>>();
        let truth = random(source_width * target_width);
        // A factor common to all dimensions makes them correlated, as activations are.
        let (common, own, errors) = (random(n), random(n * source_width), random(n * target_width));
        let (mut source, mut target) = (Vec::new(), Vec::new());
        for row in 0..n {
            let x: Vec<f64> = (0..source_width).map(|i| 0.7 * common[row] + own[row * source_width + i]).collect();
            for j in 0..target_width {
                let signal: f64 = (0..source_width).map(|i| x[i] * truth[i * target_width + j]).sum();
                let value = signal + noise * (source_width as f64).sqrt() * errors[row * target_width + j];
                target.push((30.0 + value * 10f64.powi(j as i32 % 4)) as f32);
            }
            source.extend(x.iter().enumerate().map(|(i, x)| (x * 10f64.powi(i as i32 % 3) - 5.0) as f32));
        }
        let documents = (0..n).map(|row| (row / ROWS_A_DOCUMENT) as u32 * 7).collect();
        Self { source_width, target_width, source, target, documents }
    }

    fn source(&self) -> Residual<'_> {
        Residual::new(&self.source, self.source_width).unwrap()
    }

    fn target(&self) -> Residual<'_> {
        Residual::new(&self.target, self.target_width).unwrap()
    }

    fn regression(&self, options: &RidgeOptions) -> Regression {
        Regression::new(&self.documents, options).unwrap()
    }

    fn sides(&self, regression: &Regression) -> [Side; 2] {
        [(self.source(), "source"), (self.target(), "target")]
            .map(|(rows, name)| regression.side(rows, name, 1).unwrap())
    }

    fn fit(&self, options: &RidgeOptions) -> (AffineMap, MappingQuality) {
        let regression = self.regression(options);
        let [source, target] = self.sides(&regression);
        regression.pair(&source, &target, 1).fit(LayerIndex(24), LayerIndex(10)).unwrap()
    }
}

#[test]
fn backward_is_the_regression_with_the_sides_exchanged() {
    let data = Synthetic::new(240, 5, 7, 0.3, 3);
    let options = RidgeOptions::default();
    let (map, _) = data.fit(&options);
    let regression = data.regression(&options);
    let [source, target] = data.sides(&regression);
    let (map, quality) = regression.pair(&source, &target, 1).fit_backward(map).unwrap();
    let (expected, judged) = regression.pair(&target, &source, 1).fit(LayerIndex(10), LayerIndex(24)).unwrap();
    for (found, expected) in map.backward().unwrap().iter().zip(expected.weight()) {
        assert!((found - expected).abs() < 1e-5);
    }
    assert_eq!(quality.lambda, judged.lambda);
    assert!((quality.fraction_unexplained - judged.fraction_unexplained).abs() < 1e-5);
    // What the target's row says of the source's reading is the reading of what it says of the source's row.
    let w = [1.0, -2.0, 0.5, 3.0, 0.25];
    let pulled = map.pull_back(&w).unwrap();
    for row in 1..20 {
        let read = |row: &[f32]| pulled.iter().zip(row).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
        let change = read(data.target().row(row)) - read(data.target().row(0));
        let predicted = |row: usize| -> f64 {
            expected.apply(data.target().row(row)).iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        let expected = predicted(row) - predicted(0);
        assert!((change - expected).abs() <= 1e-3 * expected.abs().max(1.0), "{change} {expected}");
    }
}

type Rows = Vec<Vec<f64>>;

fn naive_moments(rows: &Rows) -> (Vec<f64>, Vec<f64>) {
    let n = rows.len() as f64;
    let width = rows[0].len();
    let mean: Vec<f64> = (0..width).map(|j| rows.iter().map(|row| row[j]).sum::<f64>() / n).collect();
    let variance = |j: usize| rows.iter().map(|row| (row[j] - mean[j]).powi(2)).sum::<f64>() / n;
    let scale = (0..width).map(|j| variance(j).sqrt()).collect();
    (mean, scale)
}

fn naive_standardised(rows: &Rows, (mean, scale): &(Vec<f64>, Vec<f64>)) -> Rows {
    rows.iter().map(|row| (0..row.len()).map(|j| (row[j] - mean[j]) / scale[j]).collect()).collect()
}

/// `(XᵀX + penalty I)⁻¹ XᵀY` by Gaussian elimination with partial pivoting.
fn naive_ridge(x: &Rows, y: &Rows, penalty: f64) -> Rows {
    let (d_s, d_t) = (x[0].len(), y[0].len());
    let mut system = vec![vec![0.0; d_s + d_t]; d_s];
    for (i, equation) in system.iter_mut().enumerate() {
        for (x, y) in x.iter().zip(y) {
            for (sum, value) in equation.iter_mut().zip(x.iter().chain(y)) {
                *sum += x[i] * value;
            }
        }
        equation[i] += penalty;
    }
    for pivot in 0..d_s {
        let largest = (pivot..d_s).max_by(|a, b| system[*a][pivot].abs().total_cmp(&system[*b][pivot].abs())).unwrap();
        system.swap(pivot, largest);
        let divisor = system[pivot][pivot];
        system[pivot].iter_mut().for_each(|value| *value /= divisor);
        let pivot_row = system[pivot].clone();
        for (i, equation) in system.iter_mut().enumerate() {
            let factor = equation[pivot];
            if i != pivot && factor != 0.0 {
                equation.iter_mut().zip(&pivot_row).for_each(|(value, pivot)| *value -= factor * pivot);
            }
        }
    }
    system.into_iter().map(|equation| equation[d_s..].to_vec()).collect()
}

fn naive_predictions(x: &Rows, weight: &Rows) -> Rows {
    let predict = |row: &Vec<f64>, j: usize| row.iter().zip(weight).map(|(x, weights)| x * weights[j]).sum();
    x.iter().map(|row| (0..weight[0].len()).map(|j| predict(row, j)).collect()).collect()
}

#[test]
fn agrees_with_naive_normal_equations_in_f64() {
    // (rows, d_s, d_t, noise): tiny, wide enough for the blocked products, more rows than one block.
    for (n, d_s, d_t, noise) in [(120, 7, 5, 0.3), (300, 64, 80, 1.0), (1500, 24, 16, 0.05)] {
        let data = Synthetic::new(n, d_s, d_t, noise, n as u64);
        let options = RidgeOptions { seed: 3, ..RidgeOptions::default() };
        let (map, quality) = data.fit(&options);

        let folds = folds::Folds::of_options(&data.documents, &options).unwrap();
        let (heldout, train) = folds.order.split_at(folds.parts[0].end);
        let pick = |rows: Residual, which: &[usize]| -> Rows {
            which.iter().map(|row| rows.row(*row).iter().map(|x| f64::from(*x)).collect()).collect()
        };
        let [x_train, x_heldout] = [train, heldout].map(|rows| pick(data.source(), rows));
        let [y_train, y_heldout] = [train, heldout].map(|rows| pick(data.target(), rows));
        let (x_moments, y_moments) = (naive_moments(&x_train), naive_moments(&y_train));
        let (x_train, y_train) = (naive_standardised(&x_train, &x_moments), naive_standardised(&y_train, &y_moments));
        let (x_heldout, y_heldout) =
            (naive_standardised(&x_heldout, &x_moments), naive_standardised(&y_heldout, &y_moments));
        let unexplained = |lambda: f64| {
            let weight = naive_ridge(&x_train, &y_train, lambda * x_train.len() as f64);
            let predicted = naive_predictions(&x_heldout, &weight);
            let pairs = || predicted.iter().flatten().zip(y_heldout.iter().flatten());
            pairs().map(|(p, y)| (y - p).powi(2)).sum::<f64>() / pairs().map(|(_, y)| y * y).sum::<f64>()
        };
        let best = options.lambdas.iter().copied().min_by(|a, b| unexplained(*a).total_cmp(&unexplained(*b)));
        assert_eq!(Some(quality.lambda), best, "{n} {d_s} {d_t}");
        let expected = unexplained(quality.lambda);
        assert!((quality.fraction_unexplained - expected).abs() < 1e-4 * expected, "{quality:?} {expected}");
        let weight = naive_ridge(&x_train, &y_train, quality.lambda * x_train.len() as f64);
        let cosine_of = |a: &Vec<f64>, b: &Vec<f64>| {
            let dot = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        let cosines =
            naive_predictions(&x_heldout, &weight).iter().zip(&y_heldout).map(|(p, y)| cosine_of(p, y)).sum::<f64>();
        assert!((quality.cosine - cosines / x_heldout.len() as f64).abs() < 1e-4);
        assert_eq!((quality.n_train, quality.n_heldout), (x_train.len(), x_heldout.len()));

        let everything: Vec<usize> = (0..n).collect();
        let (x, y) = (pick(data.source(), &everything), pick(data.target(), &everything));
        let (x_moments, y_moments) = (naive_moments(&x), naive_moments(&y));
        let x = naive_standardised(&x, &x_moments);
        let weight = naive_ridge(&x, &naive_standardised(&y, &y_moments), quality.lambda * n as f64);
        let largest = weight.iter().flatten().fold(0.0f64, |largest, value| largest.max(value.abs()));
        for (found, expected) in map.weight().iter().zip(weight.iter().flatten()) {
            assert!((f64::from(*found) - expected).abs() < 1e-4 * largest, "{found} {expected}");
        }
        for (side, (mean, scale)) in [(map.source(), x_moments), (map.target(), y_moments)] {
            for (found, expected) in side.mean.iter().chain(&side.scale).zip(mean.iter().chain(&scale)) {
                assert!((f64::from(*found) - expected).abs() <= 1e-6 * expected.abs());
            }
        }
    }
}

#[test]
fn a_known_map_is_recovered() {
    let data = Synthetic::new(3000, 20, 12, 0.0, 1);
    let options = RidgeOptions { lambdas: vec![1e-7, 1e-2], ..RidgeOptions::default() };
    let (map, quality) = data.fit(&options);
    assert_eq!(quality.lambda, 1e-7);
    assert!(quality.fraction_unexplained < 1e-6 && quality.cosine > 0.999_999, "{quality:?}");
    for (x, y) in data.source().rows().zip(data.target().rows()) {
        for ((found, expected), scale) in map.apply(x).iter().zip(y).zip(&map.target().scale) {
            assert!((found - expected).abs() < 1e-3 * scale);
        }
    }
    let noise = Synthetic::new(3000, 20, 12, 0.5, 1);
    let (_, quality) = noise.fit(&options);
    // Signal and noise variances of a target dimension, by construction: about 20·(1/3)·(1/3·(1 + 0.49)) and 20·0.25/3.
    assert!((0.2..0.45).contains(&quality.fraction_unexplained), "{quality:?}");
}

#[test]
fn a_target_unrelated_to_the_source_is_unexplained() {
    let (data, other) = (Synthetic::new(1200, 16, 8, 0.5, 1), Synthetic::new(1200, 16, 8, 0.5, 2));
    let regression = data.regression(&RidgeOptions { cross_validate: true, ..Default::default() });
    let source = regression.side(data.source(), "source", 1).unwrap();
    let target = regression.side(other.target(), "target", 1).unwrap();
    let pair = regression.pair(&source, &target, 1);
    let quality = pair.quality().unwrap();
    assert!(quality.fraction_unexplained > 0.95 && quality.cosine.abs() < 0.1, "{quality:?}");
    assert_eq!(quality.lambda, 1.0);
    let cross_validated = pair.cross_validated(1.0).unwrap();
    assert!((0.95..1.1).contains(&cross_validated), "{cross_validated}");
    let Similarity { cca, cka } = pair.similarity().unwrap();
    assert!(cca < 0.05 && cka < 0.05, "{cca} {cka}");
}

#[test]
fn every_fold_held_out_in_turn_is_its_own_regression() {
    let data = Synthetic::new(330, 12, 9, 0.4, 9);
    let options = RidgeOptions { cross_validate: true, seed: 2, ..Default::default() };
    let regression = data.regression(&options);
    let [source, target] = data.sides(&regression);
    let pair = regression.pair(&source, &target, 1);
    let pick = |rows: Residual, which: &[usize]| -> Rows {
        which.iter().map(|row| rows.row(*row).iter().map(|x| f64::from(*x)).collect()).collect()
    };
    let (mut unexplained, mut all) = (0.0, 0.0);
    for part in &regression.folds.parts {
        let (mut train, heldout) = (regression.folds.order.clone(), &regression.folds.order[part.clone()]);
        train.drain(part.clone());
        let (x, y) = (pick(data.source(), &train), pick(data.target(), &train));
        let (x_moments, y_moments) = (naive_moments(&x), naive_moments(&y));
        let weight = naive_ridge(
            &naive_standardised(&x, &x_moments),
            &naive_standardised(&y, &y_moments),
            0.01 * train.len() as f64,
        );
        let predicted = naive_predictions(&naive_standardised(&pick(data.source(), heldout), &x_moments), &weight);
        let actual = naive_standardised(&pick(data.target(), heldout), &y_moments);
        for (predicted, actual) in predicted.iter().flatten().zip(actual.iter().flatten()) {
            unexplained += (predicted - actual).powi(2);
            all += actual * actual;
        }
    }
    let (found, expected) = (pair.cross_validated(0.01).unwrap(), unexplained / all);
    assert!((found - expected).abs() < 1e-4 * expected, "{found} {expected}");
}

#[test]
fn layers_that_differ_by_a_rotation_are_alike() {
    // A plane rotation of two unit-variance dimensions, and an exchange of two others.
    let n = 2000;
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let source: Vec<f32> = (0..n * 4).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    let rotated = |row: &[f32]| [0.6 * row[0] - 0.8 * row[1], 0.8 * row[0] + 0.6 * row[1], row[3], -row[2]];
    let target: Vec<f32> = source.chunks_exact(4).flat_map(rotated).collect();
    let documents: Vec<u32> = (0..n as u32).collect();
    let regression = Regression::new(&documents, &RidgeOptions::default()).unwrap();
    let side = |values: &[f32]| regression.side(Residual::new(values, 4).unwrap(), "rows", 1).unwrap();
    let (source, target) = (side(&source), side(&target));
    let found = regression.pair(&source, &target, 1).similarity().unwrap();
    assert!((found.cca - 1.0).abs() < 1e-4 && (found.cka - 1.0).abs() < 5e-3, "{found:?}");
    let exchanged = regression.pair(&target, &source, 1).similarity().unwrap();
    assert!((found.cca - exchanged.cca).abs() < 1e-5 && (found.cka - exchanged.cka).abs() < 1e-5);
    assert_eq!(found, regression.pair(&source, &target, 1).similarity().unwrap());
}

#[test]
fn one_source_serves_all_targets_alike_on_any_number_of_threads() {
    let data = Synthetic::new(240, 9, 6, 0.3, 5);
    let options = RidgeOptions { seed: 11, ..RidgeOptions::default() };
    let regression = data.regression(&options);
    let [source, target] = data.sides(&regression);
    let fit = |threads| regression.pair(&source, &target, threads).fit(LayerIndex(24), LayerIndex(10)).unwrap();
    assert_eq!(fit(1), data.fit(&options));
    assert_eq!(fit(3), fit(1));
    let reseeded = data.fit(&RidgeOptions { seed: 12, ..options }).1;
    assert_ne!(fit(1).1.fraction_unexplained, reseeded.fraction_unexplained);
}

#[test]
fn a_dimension_that_does_not_vary_is_harmless() {
    let mut data = Synthetic::new(240, 4, 3, 0.1, 6);
    data.source.iter_mut().skip(1).step_by(4).for_each(|x| *x = 0.1);
    data.target.iter_mut().step_by(3).for_each(|y| *y = -777.7);
    let (map, quality) = data.fit(&RidgeOptions::default());
    assert_eq!((map.source().mean[1], map.source().scale[1]), (0.1, 1.0));
    assert!(map.source().scale.iter().chain(&map.target().scale).all(|scale| *scale > 0.0));
    assert!(quality.fraction_unexplained.is_finite());
    assert_eq!(map.apply(data.source().row(5))[0], -777.7);
}

#[test]
fn what_cannot_be_fitted_is_refused() {
    let data = Synthetic::new(60, 4, 3, 0.1, 7);
    let refused = |options: RidgeOptions, documents: &[u32]| Regression::new(documents, &options).unwrap_err();
    let good = RidgeOptions::default;
    let lambdas = |lambdas: &[f64]| RidgeOptions { lambdas: lambdas.to_vec(), ..good() };
    let cases = [
        (lambdas(&[]), "`lambdas` is [], expected one or more positive numbers"),
        (lambdas(&[0.0]), "`lambdas` is [0.0], expected one or more positive numbers"),
        (RidgeOptions { folds: 1, ..good() }, "`folds` is 1, expected 2 or more"),
    ];
    for (options, expected) in cases {
        assert_eq!(refused(options, &data.documents).to_string(), expected);
    }
    assert_eq!(refused(good(), &[4; 60]), MappingError::TooFewDocuments { expected: 2, found: 1 });
    assert_eq!(refused(good(), &[]), MappingError::TooFewDocuments { expected: 2, found: 0 });
    assert_eq!(refused(good(), &[0, 1]), MappingError::TooFewRows { expected: 2, found: 1 });

    let regression = data.regression(&good());
    let side = |values: &[f32]| regression.side(Residual::new(values, 3).unwrap(), "target", 1).map(drop);
    let short = MappingError::RowCount { what: "target", expected: 60, found: 59 };
    assert_eq!(side(&data.target[3..]), Err(short));
    let mut spoilt = data.target.clone();
    spoilt[7] = f32::NEG_INFINITY;
    let expected = MappingError::NonFiniteRow { side: "target", row: 2, index: 1, value: f32::NEG_INFINITY };
    assert_eq!(side(&spoilt), Err(expected));

    let [source, _] = data.sides(&regression);
    let constant = vec![2.5; 180];
    let constant = regression.side(Residual::new(&constant, 3).unwrap(), "target", 1).unwrap();
    assert_eq!(regression.pair(&source, &constant, 1).quality(), Err(MappingError::ConstantTarget));
}

/// What is constant in training and enormous in the rows held out is unexplained, not an overflow.
#[test]
fn a_dimension_that_varies_only_where_it_is_held_out_is_not_predicted_from() {
    let mut data = Synthetic::new(60, 4, 3, 0.1, 8);
    let folds = folds::Folds::of_options(&data.documents, &RidgeOptions::default()).unwrap();
    for row in &folds.order[folds.parts[0].clone()] {
        (data.source[row * 4], data.target[row * 3]) = (3e38, 3e38);
    }
    for row in &folds.order[folds.parts[0].end..] {
        (data.source[row * 4], data.target[row * 3]) = (0.0, 0.0);
    }
    let (_, quality) = data.fit(&RidgeOptions::default());
    assert!(quality.fraction_unexplained > 0.5 && quality.fraction_unexplained.is_finite(), "{quality:?}");
}

#[test]
fn a_map_of_low_rank_is_the_best_of_its_rank() {
    let data = Synthetic::new(600, 10, 8, 0.3, 13);
    let regression = data.regression(&RidgeOptions::default());
    let [source, target] = data.sides(&regression);
    let pair = regression.pair(&source, &target, 1);
    let full = pair.refit(0.01, LayerIndex(1), LayerIndex(2)).unwrap();
    let map = |rank| pair.refit_low_rank(0.01, rank, LayerIndex(1), LayerIndex(2)).unwrap();
    for (found, expected) in map(8).weight().iter().zip(full.weight()) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
    // The penalised loss on all rows, in f64: no other matrix of the rank may have a lower one.
    let (x, y) = (data.source(), data.target());
    let z = |rows: Residual, side: &crate::mapping::Standardization| -> Rows {
        let row = |row: &[f32]| {
            let scaled = row.iter().zip(side.mean.iter().zip(&side.scale));
            scaled.map(|(x, (mean, scale))| (f64::from(*x) - f64::from(*mean)) / f64::from(*scale)).collect()
        };
        rows.rows().map(row).collect()
    };
    let (x, y) = (z(x, full.source()), z(y, full.target()));
    let loss = |weight: &[f64]| {
        let rows: Rows = weight.chunks_exact(8).map(<[f64]>::to_vec).collect();
        let predicted = naive_predictions(&x, &rows);
        let apart: f64 = predicted.iter().flatten().zip(y.iter().flatten()).map(|(p, y)| (p - y).powi(2)).sum();
        apart + 0.01 * 600.0 * weight.iter().map(|w| w * w).sum::<f64>()
    };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut last = f64::INFINITY;
    for rank in 1..=8 {
        let map = map(rank);
        let factors = map.factors().unwrap();
        assert_eq!((factors.left.len(), factors.right.len()), (10 * rank, rank * 8));
        let best = loss(&map.weight().iter().map(|w| f64::from(*w)).collect::<Vec<_>>());
        assert!(best <= last * (1.0 + 1e-6), "{rank}: {best} {last}");
        last = best;
        for _ in 0..20 {
            let mut nudged = factors.clone();
            nudged.left.iter_mut().chain(&mut nudged.right).for_each(|w| *w += rng.random_range(-1e-2f32..1e-2));
            let product: Vec<f64> = nudged
                .left
                .chunks_exact(rank)
                .flat_map(|left| {
                    let right = &nudged.right;
                    (0..8).map(move |j| {
                        left.iter().enumerate().map(|(k, l)| f64::from(*l) * f64::from(right[k * 8 + j])).sum::<f64>()
                    })
                })
                .collect();
            assert!(loss(&product) >= best * (1.0 - 1e-6), "rank {rank}");
        }
    }
    let quality = |rank| pair.low_rank_quality(rank).unwrap().fraction_unexplained;
    assert!(quality(1) > quality(4), "{} {}", quality(1), quality(4));
    assert!((quality(8) - pair.quality().unwrap().fraction_unexplained).abs() < 1e-4);
    for rank in [0, 9] {
        let error = pair.refit_low_rank(0.01, rank, LayerIndex(1), LayerIndex(2)).unwrap_err();
        assert!(error.to_string().starts_with("`rank` is"), "{error}");
    }
}
