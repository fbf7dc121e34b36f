//! The ggml functions that a graph of the guard's own needs, in one table: linked in, or looked up by name in the llama.cpp that a process has
//! loaded.

use super::super::table::{MissingSymbol, RawTensor};
use std::ffi::{CStr, c_int, c_void};
use std::marker::PhantomData;

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[repr(C)]
        pub struct $name {
            opaque: [u8; 0],
            not_send: PhantomData<*mut u8>,
        }
    )*};
}

opaque! {
    /// `ggml_context`: memory of tensors and graphs, not of their data.
    RawContext
    /// `ggml_cgraph`
    RawGraph
    /// `ggml_backend_buffer`
    RawBuffer
    /// `ggml_backend_buffer_type`
    RawBufferType
    /// `ggml_backend_device`
    RawDevice
    /// `ggml_backend`: a stream of work on a device.
    RawBackend
    /// `ggml_gallocr`: memory of a graph's intermediate values.
    RawAllocator
}

/// `ggml_init_params`
#[repr(C)]
pub struct InitParams {
    pub mem_size: usize,
    pub mem_buffer: *mut c_void,
    pub no_alloc: bool,
}

/// `GGML_TYPE_F32`
pub const F32: c_int = 0;
/// `GGML_PREC_F32`
pub const PREC_F32: c_int = 10;
/// `GGML_BACKEND_DEVICE_TYPE_CPU`
pub const DEVICE_CPU: c_int = 0;
/// `GGML_BACKEND_DEVICE_TYPE_META`: several devices that share every tensor.
pub const DEVICE_META: c_int = 4;
/// `GGML_STATUS_SUCCESS`
pub const SUCCESS: c_int = 0;

type Tensor = *mut RawTensor;
type Context = *mut RawContext;
type Unary = unsafe extern "C" fn(Context, Tensor) -> Tensor;
type Binary = unsafe extern "C" fn(Context, Tensor, Tensor) -> Tensor;
type WithTwo = unsafe extern "C" fn(Context, Tensor, f32, f32) -> Tensor;

/// Bytes from the start of a `ggml_tensor` to what no function tells: the struct differs from one llama.cpp to another.
#[derive(Clone, Copy)]
struct Layout {
    /// To its `buffer`.
    buffer: usize,
    /// To `src[1]`.
    second_source: usize,
}

macro_rules! functions {
    ($($field:ident = $symbol:ident: $signature:ty;)*) => {
        /// Functions of ggml's public C API for graphs on a device, and where a tensor keeps its buffer and its sources.
        pub struct DeviceTable {
            $(pub(super) $field: $signature,)*
            layout: Layout,
        }

        impl DeviceTable {
            /// Names of the functions that [`lookup`](Self::lookup) asks for.
            pub const SYMBOLS: &'static [&'static str] = &[$(stringify!($symbol)),*];

            /// Takes the functions from `resolve`, which gives the address of a symbol or null, and finds out where this llama.cpp's tensors keep
            /// their buffer and their sources.
            ///
            /// # Safety
            /// A non-null address that `resolve` gives for a name must be that function of ggml's C API, and stay loaded for as long as the
            /// table is used.
            ///
            /// # Errors
            /// The first function that `resolve` does not find, or the layout of tensors if that can't be found.
            pub unsafe fn lookup(mut resolve: impl FnMut(&CStr) -> *const c_void) -> Result<Self, MissingSymbol> {
                let mut table = Self {
                    $($field: {
                        const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($symbol), "\0").as_bytes()) {
                            Ok(name) => name,
                            Err(_) => panic!("a symbol has no NUL inside"),
                        };
                        let address = resolve(NAME);
                        if address.is_null() {
                            return Err(MissingSymbol { symbol: stringify!($symbol).to_owned() });
                        }
                        // SAFETY: not null; the caller guarantees that it is the function of that name, whose C signature is the field's.
                        unsafe { std::mem::transmute::<*const c_void, $signature>(address) }
                    },)*
                    layout: Layout { buffer: 0, second_source: 0 },
                };
                // SAFETY: the functions are ggml's, as the caller guarantees.
                let layout = unsafe { table.find_layout() };
                table.layout = layout.ok_or_else(|| MissingSymbol { symbol: "the layout of ggml_tensor".to_owned() })?;
                Ok(table)
            }

            /// The functions of the llama.cpp inside `llama-cpp-sys-2`, with its layout of `ggml_tensor`.
            #[cfg(feature = "engine")]
            pub fn linked() -> &'static Self {
                use llama_cpp_sys_2 as sys;
                static LINKED: std::sync::LazyLock<DeviceTable> = std::sync::LazyLock::new(|| DeviceTable {
                    // SAFETY: each is the function that the field is named after, whose types differ from the field's only in what
                    // pointers point to, and in structs and enums of the same C layout.
                    $($field: unsafe {
                        std::mem::transmute::<*const c_void, $signature>(sys::$symbol as *const c_void)
                    },)*
                    layout: Layout {
                        buffer: std::mem::offset_of!(sys::ggml_tensor, buffer),
                        second_source: std::mem::offset_of!(sys::ggml_tensor, src) + size_of::<usize>(),
                    },
                });
                &LINKED
            }
        }
    };
}

functions! {
    init = ggml_init: unsafe extern "C" fn(InitParams) -> Context;
    free = ggml_free: unsafe extern "C" fn(Context);
    tensor_overhead = ggml_tensor_overhead: unsafe extern "C" fn() -> usize;
    graph_overhead = ggml_graph_overhead_custom: unsafe extern "C" fn(usize, bool) -> usize;
    new_graph = ggml_new_graph_custom: unsafe extern "C" fn(Context, usize, bool) -> *mut RawGraph;
    expand = ggml_build_forward_expand: unsafe extern "C" fn(*mut RawGraph, Tensor);
    n_nodes = ggml_graph_n_nodes: unsafe extern "C" fn(*mut RawGraph) -> c_int;
    node = ggml_graph_node: unsafe extern "C" fn(*mut RawGraph, c_int) -> Tensor;
    new_2d = ggml_new_tensor_2d: unsafe extern "C" fn(Context, c_int, i64, i64) -> Tensor;
    view_2d = ggml_view_2d: unsafe extern "C" fn(Context, Tensor, i64, i64, usize, usize) -> Tensor;
    set_output = ggml_set_output: unsafe extern "C" fn(Tensor);
    data = ggml_get_data: unsafe extern "C" fn(*const RawTensor) -> *mut c_void;

    add = ggml_add: Binary;
    add_inplace = ggml_add_inplace: Binary;
    sub = ggml_sub: Binary;
    mul = ggml_mul: Binary;
    div = ggml_div: Binary;
    repeat = ggml_repeat: Binary;
    mul_mat = ggml_mul_mat: Binary;
    mul_mat_set_prec = ggml_mul_mat_set_prec: unsafe extern "C" fn(Tensor, c_int);
    concat = ggml_concat: unsafe extern "C" fn(Context, Tensor, Tensor, c_int) -> Tensor;
    sum_rows = ggml_sum_rows: Unary;
    sqr = ggml_sqr: Unary;
    sqrt = ggml_sqrt: Unary;
    abs = ggml_abs: Unary;
    relu = ggml_relu: Unary;
    step = ggml_step: Unary;
    scale_bias = ggml_scale_bias: WithTwo;
    clamp = ggml_clamp: WithTwo;

    allocate_all = ggml_backend_alloc_ctx_tensors: unsafe extern "C" fn(Context, *mut RawBackend) -> *mut RawBuffer;
    allocate = ggml_backend_tensor_alloc: unsafe extern "C" fn(*mut RawBuffer, Tensor, *mut c_void) -> c_int;
    read = ggml_backend_tensor_get: unsafe extern "C" fn(*const RawTensor, *mut c_void, usize, usize);
    write = ggml_backend_tensor_set: unsafe extern "C" fn(Tensor, *const c_void, usize, usize);

    buffer_free = ggml_backend_buffer_free: unsafe extern "C" fn(*mut RawBuffer);
    buffer_base = ggml_backend_buffer_get_base: unsafe extern "C" fn(*mut RawBuffer) -> *mut c_void;
    buffer_is_host = ggml_backend_buffer_is_host: unsafe extern "C" fn(*mut RawBuffer) -> bool;
    buffer_type = ggml_backend_buffer_get_type: unsafe extern "C" fn(*mut RawBuffer) -> *mut RawBufferType;
    type_device = ggml_backend_buft_get_device: unsafe extern "C" fn(*mut RawBufferType) -> *mut RawDevice;
    type_allocate = ggml_backend_buft_alloc_buffer: unsafe extern "C" fn(*mut RawBufferType, usize) -> *mut RawBuffer;

    device_by_type = ggml_backend_dev_by_type: unsafe extern "C" fn(c_int) -> *mut RawDevice;
    device_type = ggml_backend_dev_type: unsafe extern "C" fn(*mut RawDevice) -> c_int;
    device_buffer_type = ggml_backend_dev_buffer_type: unsafe extern "C" fn(*mut RawDevice) -> *mut RawBufferType;
    device_init = ggml_backend_dev_init: unsafe extern "C" fn(*mut RawDevice, *const std::ffi::c_char) -> *mut RawBackend;

    backend_free = ggml_backend_free: unsafe extern "C" fn(*mut RawBackend);
    backend_buffer_type = ggml_backend_get_default_buffer_type: unsafe extern "C" fn(*mut RawBackend) -> *mut RawBufferType;
    backend_max_size = ggml_backend_get_max_size: unsafe extern "C" fn(*mut RawBackend) -> usize;
    supports_op = ggml_backend_supports_op: unsafe extern "C" fn(*mut RawBackend, *const RawTensor) -> bool;
    supports_type = ggml_backend_supports_buft: unsafe extern "C" fn(*mut RawBackend, *mut RawBufferType) -> bool;
    compute = ggml_backend_graph_compute: unsafe extern "C" fn(*mut RawBackend, *mut RawGraph) -> c_int;

    allocator_new = ggml_gallocr_new: unsafe extern "C" fn(*mut RawBufferType) -> *mut RawAllocator;
    allocator_free = ggml_gallocr_free: unsafe extern "C" fn(*mut RawAllocator);
    allocator_allocate = ggml_gallocr_alloc_graph: unsafe extern "C" fn(*mut RawAllocator, *mut RawGraph) -> bool;
    allocator_size = ggml_gallocr_get_buffer_size: unsafe extern "C" fn(*mut RawAllocator, c_int) -> usize;
}

impl DeviceTable {
    /// The buffer that `tensor` lies in; null before it has one.
    ///
    /// # Safety
    /// `tensor` must be a valid tensor of this table's llama.cpp.
    pub(super) unsafe fn buffer_of(&self, tensor: *const RawTensor) -> *mut RawBuffer {
        // SAFETY: a `ggml_tensor` has a pointer there (`find_layout`, or the layout of the linked llama.cpp).
        unsafe { *tensor.byte_add(self.layout.buffer).cast::<*mut RawBuffer>() }
    }

    /// The data of `tensor` where its buffer is in host memory, else null.
    ///
    /// # Safety
    /// As of [`buffer_of`](Self::buffer_of).
    pub(in crate::hook) unsafe fn host_data(&self, tensor: *const RawTensor) -> *mut c_void {
        // SAFETY: guaranteed by the caller; a buffer is not freed before the graph.
        unsafe {
            let buffer = self.buffer_of(tensor);
            if buffer.is_null() || !(self.buffer_is_host)(buffer) {
                return std::ptr::null_mut();
            }
            (self.data)(tensor)
        }
    }

    /// `src[1]` of `tensor`, or null.
    ///
    /// # Safety
    /// As of [`buffer_of`](Self::buffer_of).
    pub(in crate::hook) unsafe fn second_source(&self, tensor: *const RawTensor) -> *const RawTensor {
        // SAFETY: as in `buffer_of`.
        unsafe { *tensor.byte_add(self.layout.second_source).cast::<*const RawTensor>() }
    }

    /// Finds the layout of a `ggml_tensor` by making some. Its buffer is the one pointer into it that is null before a tensor is put into a buffer and is the
    /// buffer after, and its second source the one that is the second operand of what was made of two.
    ///
    /// # Safety
    /// The functions must be ggml's.
    unsafe fn find_layout(&self) -> Option<Layout> {
        const SIZE: usize = 256;
        // SAFETY: plain use of ggml. The words that are read lie in the context's memory, which has room for more tensors than are made: one takes
        // `tensor_overhead` with its header. What was made is freed, the context last.
        unsafe {
            let device = (self.device_by_type)(DEVICE_CPU);
            if device.is_null() {
                return None;
            }
            let overhead = (self.tensor_overhead)();
            let params = InitParams { mem_size: 8 * overhead, mem_buffer: std::ptr::null_mut(), no_alloc: true };
            let context = (self.init)(params);
            if context.is_null() {
                return None;
            }
            let n_words = overhead / size_of::<usize>();
            let words_of = |tensor: Tensor| tensor.cast_const().cast::<*const c_void>();
            let word_of = |tensor: Tensor, pointer: *const c_void, was: &dyn Fn(usize) -> bool| {
                let found = (0..n_words).find(|word| was(*word) && *words_of(tensor).add(*word) == pointer);
                found.map(|word| word * size_of::<usize>())
            };
            let [first, second] = [(); 2].map(|()| (self.new_2d)(context, F32, 4, 1));
            let sum = (self.add)(context, first, second);
            let second_source = word_of(sum, second.cast_const().cast(), &|_| true);
            let before: Vec<bool> = (0..n_words).map(|word| (*words_of(first).add(word)).is_null()).collect();
            let buffer = (self.type_allocate)((self.device_buffer_type)(device), SIZE);
            let buffer_offset = (!buffer.is_null()).then(|| {
                (self.allocate)(buffer, first, (self.buffer_base)(buffer));
                let found = word_of(first, buffer.cast_const().cast(), &|word| before[word]);
                (self.buffer_free)(buffer);
                found
            });
            (self.free)(context);
            Some(Layout { buffer: buffer_offset.flatten()?, second_source: second_source? })
        }
    }
}
