//! Ridge regressions between all layers of two models, or of one wide pair, timed: `mapping pairs` and `mapping wide`, with
//! `SCALE` (a number from 0 to 1, 1 where absent) as the part of the rows. Prints seconds. `benches/mapping.sh` runs it in turn with the
//! same in numpy.

use pilotfish::mapping::{Regression, RidgeOptions, Side};
use pilotfish::tensor::{LayerIndex, Residual};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Layers and width of the source, the same of the target, and rows.
struct Shape {
    source: (usize, usize),
    target: (usize, usize),
    rows: usize,
}

const PAIRS: Shape = Shape { source: (30, 576), target: (18, 640), rows: 15_000 };
const WIDE: Shape = Shape { source: (1, 2048), target: (1, 4096), rows: 100_000 };
const ROWS_A_DOCUMENT: usize = 40;

fn main() {
    // What cargo adds to a bench's arguments.
    let shape = std::env::args().skip(1).find(|argument| argument != "--bench");
    let shape = match shape.as_deref() {
        None | Some("pairs") => PAIRS,
        Some("wide") => WIDE,
        Some(other) => panic!("`{other}` is neither `pairs` nor `wide`"),
    };
    let scale: f64 = std::env::var("SCALE").map_or(1.0, |scale| scale.parse().expect("SCALE is a number"));
    let rows = (shape.rows as f64 * scale) as usize;
    let documents: Vec<u32> = (0..rows).map(|row| (row / ROWS_A_DOCUMENT) as u32).collect();
    // Both sides share factors, so that there is something to predict.
    let factors = random(rows * FACTORS, 0);
    let layers = |(count, width): (usize, usize), seed: u64| -> Vec<Vec<f32>> {
        (0..count).map(|layer| activations(rows, width, &factors, seed + layer as u64)).collect()
    };
    let (source, target) = (layers(shape.source, 1000), layers(shape.target, 2000));

    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let start = Instant::now();
    let unexplained = fit_all(&documents, (&source, shape.source.1), (&target, shape.target.1), threads);
    println!("{:.3} s, mean unexplained {unexplained:.4}", start.elapsed().as_secs_f64());
}

const FACTORS: usize = 32;

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

fn activations(rows: usize, width: usize, factors: &[f32], seed: u64) -> Vec<f32> {
    let (mix, mut values) = (random(FACTORS * width, seed), random(rows * width, seed + 500));
    for (row, factors) in values.chunks_exact_mut(width).zip(factors.chunks_exact(FACTORS)) {
        for (factor, mix) in factors.iter().zip(mix.chunks_exact(width)) {
            row.iter_mut().zip(mix).for_each(|(value, mix)| *value += 0.3 * factor * mix);
        }
    }
    values
}

/// Every pair fitted and judged. Many layers are shared among threads a source layer each; one pair has all threads.
fn fit_all(documents: &[u32], source: (&[Vec<f32>], usize), target: (&[Vec<f32>], usize), threads: usize) -> f64 {
    let regression = Regression::new(documents, &RidgeOptions::default()).unwrap();
    let outer = threads.min(source.0.len());
    let inner = threads.div_ceil(outer);
    let side =
        |values: &Vec<f32>, width, name| regression.side(Residual::new(values, width).unwrap(), name, inner).unwrap();
    let target: Vec<Side> = each(target.0.len(), outer, |layer| side(&target.0[layer], target.1, "target"));
    let unexplained = each(source.0.len(), outer, |layer| {
        let source = side(&source.0[layer], source.1, "source");
        let fit = |(index, target): (usize, &Side)| {
            let pair = regression.pair(&source, target, inner);
            let (map, quality) = pair.fit(LayerIndex(layer as u32), LayerIndex(index as u32)).unwrap();
            std::hint::black_box(map);
            quality.fraction_unexplained
        };
        target.iter().enumerate().map(fit).sum::<f64>()
    });
    unexplained.iter().sum::<f64>() / (source.0.len() * target.len()) as f64
}

fn each<R: Send>(count: usize, threads: usize, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let mut done: Vec<(usize, R)> = std::thread::scope(|scope| {
        let worker = || {
            let indices =
                std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|index| *index < count));
            indices.map(|index| (index, work(index))).collect::<Vec<_>>()
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
