//! What a guard does to a residual at one hook point, without a model: each program beside a plain copy of the same rows, so that
//! figures are ratios of one run. `pilotfish bench` times the same inside a real model.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pilotfish::guard::{Digest, Guard};
use pilotfish::program::{Calibration, ModelShape, Program, Row, RowKind, Scratch, Sequences};
use pilotfish::tensor::{HiddenSize, LayerIndex, ResidualMut, SequenceId, TokenPosition};
use safetensors::tensor::{Dtype, TensorView};
use std::hint::black_box;
use std::sync::Arc;

const LAYER: LayerIndex = LayerIndex(0);

/// Residual widths: SmolLM2-135M, a 3B, an 8B model.
const WIDTHS: [usize; 3] = [576, 2048, 4096];
/// Rows: a token of an answer, and a micro-batch of a prompt.
const ROWS: [usize; 2] = [1, 512];

/// Each with what it adds to the manifest.
const PROGRAMS: [(&str, &str); 4] = [
    ("gate", "[[gate]]\nname = \"g\"\nvector = \"v\"\nthreshold = 2.0\nmean = 0.0\ndeviation = 1.0\n"),
    ("add", "[[intervention]]\nkind = \"add\"\nvector = \"v\"\nstrength = 1e-6\n"),
    ("ablate", "[[intervention]]\nkind = \"ablate\"\nvector = \"v\"\nmean = 0.5\n"),
    ("clamp", "[[intervention]]\nkind = \"clamp\"\nvector = \"v\"\nlow = -1.0\nhigh = 1.0\n"),
];

fn program(width: usize, policy: &str) -> Program {
    let values: Vec<u8> = (0..width).flat_map(|i| ((i as f32 * 0.37).sin()).to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![width], &values).expect("one row");
    let tensors = safetensors::serialize([("v.0", view)], None).expect("a tensor file");
    let manifest = format!(
        "format = 1\nname = \"bench\"\ndescription = \"\"\n[target]\narchitecture = \"llama\"\nfingerprint = \"{0}\"\n\
         [tensors]\nfile = \"tensors.safetensors\"\nsha256 = \"{0}\"\n\
         [[vector]]\nname = \"v\"\nlayer = 0\ntensor = \"v.0\"\n{policy}",
        Digest::of(&tensors)
    );
    let guard = Guard::from_parts("bench", manifest.as_bytes(), &tensors, &[]).expect("a valid guard");
    let shape = ModelShape { n_embd: HiddenSize(width), n_layer: 1 };
    Program::compile(&guard, shape, Calibration::Required).expect("a guard of this width")
}

fn rows_of(n: usize) -> Vec<Row> {
    let kind = if n == 1 { RowKind::Generated } else { RowKind::Prompt };
    let sequence = Some(SequenceId(0));
    let row = |index| Row { sequence, position: TokenPosition(index as i32 + 1), kind, index };
    (0..n).map(row).collect()
}

fn hook_point(c: &mut Criterion) {
    for width in WIDTHS {
        for n_rows in ROWS {
            let mut group = c.benchmark_group(format!("{n_rows} rows of {width}"));
            group.throughput(Throughput::Bytes((n_rows * width * size_of::<f32>()) as u64));
            let mut values: Vec<f32> = (0..n_rows * width).map(|i| (i as f32 * 0.11).cos()).collect();
            let mut copy = values.clone();
            group.bench_function("copy", |b| b.iter(|| copy.copy_from_slice(black_box(&values))));
            let rows = rows_of(n_rows);
            for (name, policy) in PROGRAMS {
                let program = program(width, policy);
                let mut sequences = Sequences::new(Arc::new(program));
                sequences.begin(rows.iter().filter_map(|row| Some((row.sequence?, row.position, row.kind))));
                sequences.begin_rows(n_rows);
                let mut scratch = Scratch::default();
                group.bench_function(BenchmarkId::from_parameter(name), |b| {
                    b.iter(|| {
                        let mut residual = ResidualMut::new(black_box(&mut values), width).expect("whole rows");
                        sequences.run(LAYER, &rows, &mut residual, &mut scratch).expect("a row each")
                    });
                });
            }
        }
    }
}

criterion_group!(benches, hook_point);
criterion_main!(benches);
