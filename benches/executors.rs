//! The three ways to reach a residual, on the CPU: in place, by copy, and by ggml graphs of the guard's own. The hook is shown a tensor of its own name
//! as llama.cpp would show it, with no model behind it; all three take turns, and what counts is the median of each round's ratios to `host`.
//!
//! `cargo bench --profile dev --bench executors -- [WIDTH …]`

use llama_cpp_sys_2 as sys;
use pilotfish::engine::backend;
use pilotfish::hook::{BatchRow, ExecutorKind, GgmlTable, Hook, Splitting};
use pilotfish::program::Program;
use pilotfish::tensor::quantile;
use programs::{KINDS, ROWS, WIDTHS, rows};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[path = "support/programs.rs"]
mod programs;

const EXECUTORS: [ExecutorKind; 3] = [ExecutorKind::Host, ExecutorKind::Copy, ExecutorKind::Device];

/// Rounds, each of as many runs as take about this long.
const ROUNDS: usize = 15;
const ROUND: Duration = Duration::from_millis(2);

fn main() {
    let asked: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let widths = if asked.is_empty() { WIDTHS.to_vec() } else { asked };
    backend().expect("llama.cpp starts");
    println!("| width | rows | program | host, µs | copy, ratio | device, ratio |");
    println!("|---|---|---|---|---|---|");
    for width in widths {
        for n_rows in ROWS {
            let residual = Residual::new(width, n_rows);
            for kind in KINDS.into_iter().filter(|kind| kind.reaches(width)) {
                let program = Arc::new(kind.program(width));
                let mut runs = EXECUTORS.map(|executor| Run::new(executor, &program, n_rows));
                let once = runs.each_mut().map(|run| {
                    // The first makes buffers and graphs.
                    run.time(&residual, 1);
                    run.time(&residual, 1)
                });
                let n = once.map(|once| (ROUND.as_secs_f64() / once).clamp(1.0, 10_000.0) as usize);
                let round = |_| -> Vec<f64> { runs.iter_mut().zip(n).map(|(run, n)| run.time(&residual, n)).collect() };
                let rounds: Vec<Vec<f64>> = (0..ROUNDS).map(round).collect();
                let median = |of: &dyn Fn(&Vec<f64>) -> f64| quantile(&rounds.iter().map(of).collect::<Vec<_>>(), 0.5);
                println!(
                    "| {width} | {n_rows} | {} | {:.2} | {:.2} | {:.2} |",
                    kind.name,
                    1e6 * median(&|round| round[0]),
                    median(&|round| round[1] / round[0]),
                    median(&|round| round[2] / round[0])
                );
            }
        }
    }
}

/// A hook, and the batch that it is shown again and again.
struct Run {
    hook: Box<Hook>,
    executor: ExecutorKind,
    batch: Vec<BatchRow>,
}

impl Run {
    fn new(executor: ExecutorKind, program: &Arc<Program>, n_rows: usize) -> Self {
        let mut hook = Box::new(Hook::new(GgmlTable::linked(), Arc::clone(program)));
        hook.set_executor_kind(executor);
        let row = |(sequence, position, kind)| BatchRow { sequence, position, kind, output: true };
        Self { hook, executor, batch: rows(n_rows).into_iter().map(row).collect() }
    }

    /// Seconds that the callback takes, the mean of `n` decodes.
    fn time(&mut self, residual: &Residual, n: usize) -> f64 {
        let mut spent = Duration::ZERO;
        for _ in 0..n {
            self.hook.clear_all();
            self.hook.begin(&self.batch, &[], Splitting { n_streams: 1, n_ubatch: self.batch.len() });
            let hook: *mut Hook = &raw mut *self.hook;
            let start = Instant::now();
            // SAFETY: the hook and the tensor live, the tensor is of the llama.cpp that is linked, and nothing else uses them meanwhile.
            unsafe {
                Hook::callback(residual.tensor.cast(), true, hook.cast());
                Hook::callback(residual.tensor.cast(), false, hook.cast());
            }
            spent += start.elapsed();
            self.hook.finish().expect("the hook point fires");
        }
        assert_eq!(self.hook.executor_kind(), self.executor);
        spent.as_secs_f64() / n as f64
    }
}

/// A tensor `l_out-0` in the CPU's memory.
struct Residual {
    context: *mut sys::ggml_context,
    buffer: *mut sys::ggml_backend_buffer,
    tensor: *mut sys::ggml_tensor,
}

impl Residual {
    fn new(width: usize, n_rows: usize) -> Self {
        let values: Vec<f32> = (0..n_rows * width).map(|i| (i as f32 * 0.11).cos()).collect();
        // SAFETY: plain use of ggml.h; context and buffer are freed in `drop`, and the tensor has room for `values`.
        unsafe {
            let mem_size = 2 * sys::ggml_tensor_overhead();
            let context =
                sys::ggml_init(sys::ggml_init_params { mem_size, mem_buffer: std::ptr::null_mut(), no_alloc: true });
            assert!(!context.is_null(), "ggml makes a context");
            let tensor = sys::ggml_new_tensor_2d(context, sys::GGML_TYPE_F32, width as i64, n_rows as i64);
            sys::ggml_set_name(tensor, c"l_out-0".as_ptr());
            let buffer = sys::ggml_backend_alloc_ctx_tensors_from_buft(context, sys::ggml_backend_cpu_buffer_type());
            assert!(!buffer.is_null(), "ggml finds memory");
            sys::ggml_backend_tensor_set(tensor, values.as_ptr().cast(), 0, size_of_val(values.as_slice()));
            Self { context, buffer, tensor }
        }
    }
}

impl Drop for Residual {
    fn drop(&mut self) {
        // SAFETY: made in `new` and freed only here.
        unsafe {
            sys::ggml_backend_buffer_free(self.buffer);
            sys::ggml_free(self.context);
        }
    }
}
