//! A device that fails under a guard, at every call of a prefill and of some steps of an answer in turn: what goes wrong with one program's graph
//! ends the sequences of that program, and no other.

use super::device::{TOLERANCE_OF_PRODUCTS, compiled};
use super::table::Hooked;
use super::*;
use crate::raw_llama::linked_symbol;
use llama_cpp_sys_2 as sys;
use pilotfish::hook::{Capture, CaptureRows, DeviceTable, ExecutorKind, GgmlTable, HookFault};
use pilotfish::program::RowFault;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

/// A prompt and two tokens of an answer.
const DECODES: usize = 3;
const SEQUENCES: [SequenceId; 2] = [ONLY, OTHER];

// llama.cpp calls back on the thread that decodes, which is the test's own.
thread_local! {
    /// How many calls go well before one fails; `None` where none is to.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    /// A backend that failed: it computes nothing more, as Metal's.
    static BROKEN: Cell<*mut c_void> = const { Cell::new(ptr::null_mut()) };
}

/// Whether this call is the one that fails.
fn fails() -> bool {
    let left = LEFT.get();
    LEFT.set(left.and_then(|left| left.checked_sub(1)));
    left == Some(0)
}

// SAFETY (of every function here): the arguments are those of the function of ggml that it stands for.

unsafe extern "C" fn computes_nothing(backend: *mut c_void, graph: *mut c_void) -> c_int {
    if fails() {
        BROKEN.set(backend);
    }
    if BROKEN.get() == backend {
        return sys::GGML_STATUS_FAILED;
    }
    // SAFETY: see above.
    unsafe { sys::ggml_backend_graph_compute(backend.cast(), graph.cast()) }
}

unsafe extern "C" fn computes_and_fails(backend: *mut c_void, graph: *mut c_void) -> c_int {
    // SAFETY: see above.
    let status = unsafe { sys::ggml_backend_graph_compute(backend.cast(), graph.cast()) };
    if fails() { sys::GGML_STATUS_FAILED } else { status }
}

unsafe extern "C" fn allocates_no_tensors(context: *mut c_void, backend: *mut c_void) -> *mut c_void {
    // SAFETY: see above.
    if fails() {
        ptr::null_mut()
    } else {
        unsafe { sys::ggml_backend_alloc_ctx_tensors(context.cast(), backend.cast()).cast() }
    }
}

unsafe extern "C" fn makes_no_context(params: sys::ggml_init_params) -> *mut c_void {
    // SAFETY: see above.
    if fails() { ptr::null_mut() } else { unsafe { sys::ggml_init(params).cast() } }
}

unsafe extern "C" fn makes_no_backend(device: *mut c_void, params: *const c_char) -> *mut c_void {
    // SAFETY: see above.
    if fails() { ptr::null_mut() } else { unsafe { sys::ggml_backend_dev_init(device.cast(), params).cast() } }
}

unsafe extern "C" fn makes_no_allocator(buffer_type: *mut c_void) -> *mut c_void {
    // SAFETY: see above.
    if fails() { ptr::null_mut() } else { unsafe { sys::ggml_gallocr_new(buffer_type.cast()).cast() } }
}

/// `ggml_backend_buffer_type` of the llama.cpp that is pinned (ggml-backend-impl.h), and the one that it is a copy of.
#[repr(C)]
#[derive(Clone, Copy)]
struct FullDevice {
    get_name: usize,
    alloc_buffer: unsafe extern "C" fn(*mut Self, usize) -> *mut c_void,
    other_functions: [usize; 6],
    device: usize,
    context: usize,
    original: sys::ggml_backend_buffer_type_t,
}

/// The kind of memory of graphs' intermediate values, of which there may be none left: ggml's own allocator finds out.
unsafe extern "C" fn memory_that_runs_out(backend: *mut c_void) -> *mut c_void {
    unsafe extern "C" fn alloc_buffer(full: *mut FullDevice, size: usize) -> *mut c_void {
        if fails() {
            return ptr::null_mut();
        }
        // SAFETY: ggml gives the buffer type that it was given, which is `copy` below.
        unsafe { sys::ggml_backend_buft_alloc_buffer((*full).original, size).cast() }
    }
    // SAFETY: see above; the original is of the layout that `FullDevice` begins with.
    unsafe {
        let original = sys::ggml_backend_get_default_buffer_type(backend.cast());
        let mut copy = std::mem::MaybeUninit::<FullDevice>::uninit();
        ptr::copy_nonoverlapping(
            original.cast::<u8>(),
            copy.as_mut_ptr().cast(),
            std::mem::offset_of!(FullDevice, original),
        );
        (&raw mut (*copy.as_mut_ptr()).original).write(original);
        let copy = copy.assume_init();
        // Buffer types are for the life of the process.
        ptr::from_mut(Box::leak(Box::new(FullDevice { alloc_buffer, ..copy }))).cast()
    }
}

/// What a failing call does to a decode.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Outcome {
    /// It ends one sequence.
    Ends,
    /// Residuals go by copy.
    Copies,
    /// One or the other: whether anything has been computed by then.
    Either,
}

struct Failure {
    symbol: &'static CStr,
    instead: *const c_void,
    outcome: Outcome,
}

fn failures() -> [Failure; 7] {
    use Outcome::{Copies, Either, Ends};
    let failure = |symbol, instead, outcome| Failure { symbol, instead, outcome };
    [
        failure(c"ggml_backend_graph_compute", computes_nothing as *const c_void, Ends),
        failure(c"ggml_backend_graph_compute", computes_and_fails as *const c_void, Ends),
        failure(c"ggml_backend_get_default_buffer_type", memory_that_runs_out as *const c_void, Ends),
        failure(c"ggml_backend_alloc_ctx_tensors", allocates_no_tensors as *const c_void, Either),
        failure(c"ggml_init", makes_no_context as *const c_void, Either),
        failure(c"ggml_backend_dev_init", makes_no_backend as *const c_void, Copies),
        failure(c"ggml_gallocr_new", makes_no_allocator as *const c_void, Copies),
    ]
}

impl Failure {
    fn table(&self) -> GgmlTable {
        // SAFETY: the functions of those names of the llama.cpp that runs the model, which is never unloaded, but for one, of the same signature.
        let table =
            unsafe { DeviceTable::lookup(|name| if name == self.symbol { self.instead } else { linked_symbol(name) }) };
        GgmlTable::linked().with_device(Box::leak(Box::new(table.unwrap())))
    }
}

/// Two sequences, each under its own program.
struct Two<'t> {
    tiny: &'t Tiny,
    programs: [Arc<Program>; 2],
    scripts: [Script; 2],
}

/// What came of the decodes.
#[derive(Default)]
struct Seen {
    /// By sequence and decode, until it ended.
    logits: [Vec<Vec<f32>>; 2],
    ended: [Option<HookFault>; 2],
    /// What the hook said, whatever guards say of errors.
    faults: Vec<HookFault>,
}

impl<'t> Two<'t> {
    /// Both read at layer 0; layer 1 is the first one's alone, layer 2 the second's.
    fn new(tiny: &'t Tiny, on_error: OnError) -> Self {
        let gated = InterventionEntry { when: Some("g".into()), positions: Positions::Generated, ..add("g") };
        let first = tiny.policy().on_error(on_error).vector("g", 0).vector("v", 1).vector("t", 1);
        let first = first.gate(gate("g", Aggregate::Mean, -NEVER, OnFire::Steer)).gate(token_gate("t", -NEVER, None));
        let first = first.intervene(gated).intervene(ablate("v", 4.0));
        let second = tiny.policy().on_error(on_error).vector("g", 0).vector("w", 2);
        let second = second.gate(gate("g", Aggregate::Last, NEVER, OnFire::Block)).intervene(rotate("w", 40.0));
        let programs = [first.guard(), second.guard()].map(|guard| compiled(tiny, &guard));
        let scripts = [tiny.script(), Script { prompt: tiny.tokens("a song of the water bird"), ..tiny.script() }];
        Self { tiny, programs, scripts }
    }

    fn context(&self, table: GgmlTable) -> Hooked<'t> {
        let observer = Arc::new(Program::observer(self.tiny.model.shape()));
        let mut hooked = Hooked::new(self.tiny, table, observer, params_for_two());
        hooked.hook().set_executor_kind(ExecutorKind::Device);
        hooked
    }

    fn rows(&self, index: usize, decode: usize) -> Vec<(LlamaToken, BatchRow)> {
        let mut rows = self.scripts[index].decodes().swap_remove(decode);
        let last = rows.len() - 1;
        for (at, (_, row)) in rows.iter_mut().enumerate() {
            (row.sequence, row.output) = (SEQUENCES[index], at == last);
        }
        rows
    }

    /// Begins `sequences` and runs them in one batch, each until it ends.
    fn run(&self, hooked: &mut Hooked<'_>, sequences: &[usize]) -> Seen {
        let mut seen = Seen::default();
        for index in sequences {
            hooked.forget(SEQUENCES[*index]);
            hooked.hook().assign(SEQUENCES[*index], Arc::clone(&self.programs[*index]));
        }
        for decode in 0..DECODES {
            let live: Vec<usize> = sequences.iter().copied().filter(|index| seen.ended[*index].is_none()).collect();
            let rows: Vec<_> = live.iter().flat_map(|index| self.rows(*index, decode)).collect();
            if rows.is_empty() {
                break;
            }
            let (outcome, logits) = hooked.decode_each(&rows);
            seen.faults.extend(outcome.err());
            let captured = hooked.hook().take_captured();
            for (index, logits) in live.into_iter().zip(logits) {
                let Some(fault) = hooked.hook().fault_of(SEQUENCES[index]).cloned() else {
                    seen.logits[index].push(logits);
                    continue;
                };
                if let HookFault::Row { layer, .. } = fault {
                    let there = captured.iter().find(|captured| captured.layer == layer).unwrap();
                    let own = there.each().filter(|(row, _)| row.sequence == Some(SEQUENCES[index]));
                    let mut own = own.peekable();
                    assert!(own.peek().is_some(), "{fault}");
                    assert!(own.all(|(_, values)| values.iter().all(|x| *x == 0.0)), "{fault}: its rows are not zero");
                }
                seen.ended[index] = Some(fault);
            }
        }
        seen
    }

    /// What each gives that nothing went wrong with.
    fn alone(&self) -> [Vec<Vec<f32>>; 2] {
        let mut index = 0;
        [(); 2].map(|()| {
            let mut hooked = self.context(GgmlTable::linked());
            let mut seen = self.run(&mut hooked, &[index]);
            assert_eq!((hooked.hook().executor_kind(), seen.faults.len()), (ExecutorKind::Device, 0));
            index += 1;
            std::mem::take(&mut seen.logits[index - 1])
        })
    }
}

fn is_close(found: &[Vec<f32>], expected: &[Vec<f32>]) -> bool {
    let close =
        |(found, expected): (&Vec<f32>, &Vec<f32>)| distance(found, &widened(expected)) <= 3.0 * TOLERANCE_OF_PRODUCTS;
    found.len() <= expected.len() && found.iter().zip(expected).all(close)
}

/// Runs both with call number 0, 1, 2 … failing, until there is no such call, and gives each run to `check`. Returns how many there were.
fn sweep<'t>(two: &Two<'t>, failure: &Failure, mut check: impl FnMut(&str, &mut Hooked<'t>, Seen)) -> usize {
    let table = failure.table();
    for call in 0.. {
        let mut hooked = two.context(table);
        hooked.hook().set_capture(Some(Capture::new((0..LAYERS).map(LayerIndex), CaptureRows::All)));
        LEFT.set(Some(call));
        let seen = two.run(&mut hooked, &[0, 1]);
        BROKEN.set(ptr::null_mut());
        let what = format!("{}: call {call} of {:?}", two.tiny.name(), failure.symbol);
        if LEFT.take().is_some() {
            assert!(seen.faults.is_empty(), "{what}: {:?}", seen.faults);
            return call;
        }
        check(&what, &mut hooked, seen);
    }
    unreachable!("a decode ends")
}

#[test]
fn a_device_that_fails_ends_the_sequence_whose_graph_it_was() {
    for tiny in Tiny::all_placed() {
        let two = Two::new(&tiny, OnError::Block);
        let alone = two.alone();
        for failure in failures() {
            let mut places = BTreeSet::new();
            let n_calls = sweep(&two, &failure, |what, hooked, seen| {
                for (index, expected) in alone.iter().enumerate() {
                    assert!(is_close(&seen.logits[index], expected), "{what}: sequence {index} is off");
                }
                let ended: Vec<usize> = (0..2).filter(|index| seen.ended[*index].is_some()).collect();
                let n_expected = match failure.outcome {
                    Outcome::Ends => 1..=1,
                    Outcome::Copies => 0..=0,
                    Outcome::Either => 0..=1,
                };
                assert!(
                    n_expected.contains(&ended.len()) && seen.faults.len() == ended.len(),
                    "{what}: {:?}",
                    seen.ended
                );
                for index in ended {
                    let fault = seen.ended[index].as_ref().unwrap();
                    let HookFault::Row { layer, source: RowFault::Device { .. } } = fault else {
                        panic!("{what}: {fault}")
                    };
                    assert!(two.programs[index].points().iter().any(|point| point.layer == *layer), "{what}: {fault}");
                    places.insert((index, *layer));
                    let again = two.run(hooked, &[index]);
                    assert!(
                        again.faults.is_empty() && again.logits[index].len() == DECODES,
                        "{what}: {:?}",
                        again.faults
                    );
                    assert!(
                        is_close(&again.logits[index], &alone[index]),
                        "{what}: sequence {index} after it was cleared"
                    );
                }
            });
            assert!(n_calls > 0, "{:?} is never called", failure.symbol);
            if failure.symbol == c"ggml_backend_graph_compute" {
                let everywhere = [(0, 0), (0, 1), (1, 0), (1, 2)].map(|(index, layer)| (index, LayerIndex(layer)));
                assert_eq!(places, BTreeSet::from(everywhere), "{}", tiny.name());
            }
        }
    }
}

/// The other's rows are what they would be; those of the sequence whose graph failed are unguarded, and it is told.
#[test]
fn a_device_that_fails_under_a_guard_that_lets_it_pass_changes_no_other_sequence() {
    for tiny in Tiny::all_placed() {
        let two = Two::new(&tiny, OnError::Pass);
        let alone = two.alone();
        for failure in failures().into_iter().filter(|failure| failure.outcome == Outcome::Ends) {
            sweep(&two, &failure, |what, _, seen| {
                assert_eq!((&seen.ended, seen.faults.len()), (&[None, None], 1), "{what}");
                assert!(seen.logits.iter().all(|logits| logits.len() == DECODES), "{what}");
                let n_close = (0..2).filter(|index| is_close(&seen.logits[*index], &alone[*index])).count();
                assert!(n_close >= 1, "{what}: both sequences are off");
            });
        }
    }
}
