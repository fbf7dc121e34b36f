//! What a guard does to a residual at one hook point, without a model: each program beside a plain copy of the same rows, so that
//! figures are ratios of one run. `pilotfish bench` times the same inside a real model.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pilotfish::program::{Row, Scratch, Sequences};
use pilotfish::tensor::ResidualMut;
use programs::{KINDS, LAYER, ROWS, WIDTHS, rows};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

#[path = "support/programs.rs"]
mod programs;

fn hook_point(c: &mut Criterion) {
    for width in WIDTHS {
        for n_rows in ROWS {
            let mut group = c.benchmark_group(format!("{n_rows} rows of {width}"));
            group.throughput(Throughput::Bytes((n_rows * width * size_of::<f32>()) as u64));
            let mut values: Vec<f32> = (0..n_rows * width).map(|i| (i as f32 * 0.11).cos()).collect();
            let mut copy = values.clone();
            group.bench_function("copy", |b| b.iter(|| copy.copy_from_slice(black_box(&values))));
            let of_batch = rows(n_rows);
            let row = |(index, &(sequence, position, kind))| Row {
                sequence: Some(sequence),
                position,
                kind,
                index,
                matched: 0,
            };
            let rows: Vec<Row> = of_batch.iter().enumerate().map(row).collect();
            for kind in KINDS.into_iter().filter(|kind| kind.reaches(width)) {
                let mut sequences = Sequences::new(Arc::new(kind.program(width)));
                sequences.begin(of_batch.iter().copied());
                sequences.begin_rows(n_rows);
                let mut scratch = Scratch::default();
                group.bench_function(BenchmarkId::from_parameter(kind.name), |b| {
                    b.iter(|| {
                        let mut residual = ResidualMut::new(black_box(&mut values), width).expect("whole rows");
                        sequences.run(LAYER, &rows, &mut residual, &mut scratch).expect("a row each")
                    });
                });
            }
        }
    }
}

/// A hundred figures in some minutes.
fn briefly() -> Criterion {
    Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group!(name = benches; config = briefly(); targets = hook_point);
criterion_main!(benches);
