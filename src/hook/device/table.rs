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

macro_rules! functions {
    ($($field:ident = $symbol:ident: $signature:ty;)*) => {
        /// Functions of ggml's public C API for graphs on a device, and where a tensor keeps its buffer.
        pub struct DeviceTable {
            $(pub(super) $field: $signature,)*
            /// Bytes from the start of a `ggml_tensor` to its `buffer`.
            pub(super) buffer_offset: usize,
        }

        impl DeviceTable {
            /// Names of the functions that [`lookup`](Self::lookup) asks for.
            pub const SYMBOLS: &'static [&'static str] = &[$(stringify!($symbol)),*];

            /// Takes the functions from `resolve`, which gives the address of a symbol or null, and finds out where this llama.cpp's tensors keep
            /// their buffer.
            ///
            /// # Safety
            /// A non-null address that `resolve` gives for a name must be that function of ggml's C API, and stay loaded for as long as the
            /// table is used.
            ///
            /// # Errors
            /// The first function that `resolve` does not find, or `ggml_tensor.buffer` if that can't be found.
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
                    buffer_offset: 0,
                };
                // SAFETY: the functions are ggml's, as the caller guarantees.
                let offset = unsafe { table.find_buffer_offset() };
                table.buffer_offset = offset.ok_or_else(|| MissingSymbol { symbol: "ggml_tensor.buffer".to_owned() })?;
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
                    buffer_offset: std::mem::offset_of!(sys::ggml_tensor, buffer),
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
        // SAFETY: a `ggml_tensor` has a pointer there (`find_buffer_offset`, or the layout of the linked llama.cpp).
        unsafe { *tensor.byte_add(self.buffer_offset).cast::<*mut RawBuffer>() }
    }

    /// Where a `ggml_tensor` keeps its buffer: the one pointer into it that is null before a tensor is put into a buffer and is the buffer after.
    /// There is no function that tells, and the struct differs from one llama.cpp to another.
    ///
    /// # Safety
    /// The functions must be ggml's.
    unsafe fn find_buffer_offset(&self) -> Option<usize> {
        const SIZE: usize = 256;
        // SAFETY: plain use of ggml. The words that are read lie in the context's memory, which has room for several tensors: one takes
        // `tensor_overhead` with its header. What was made is freed, the context last.
        unsafe {
            let device = (self.device_by_type)(DEVICE_CPU);
            if device.is_null() {
                return None;
            }
            let overhead = (self.tensor_overhead)();
            let params = InitParams { mem_size: 4 * overhead, mem_buffer: std::ptr::null_mut(), no_alloc: true };
            let context = (self.init)(params);
            if context.is_null() {
                return None;
            }
            let tensor = (self.new_2d)(context, F32, 4, 1);
            let words: *const *mut RawBuffer = tensor.cast_const().cast();
            let n_words = overhead / size_of::<usize>();
            let before: Vec<bool> = (0..n_words).map(|word| (*words.add(word)).is_null()).collect();
            let buffer = (self.type_allocate)((self.device_buffer_type)(device), SIZE);
            let found = (!buffer.is_null()).then(|| {
                (self.allocate)(buffer, tensor, (self.buffer_base)(buffer));
                let found = (0..n_words).find(|word| before[*word] && *words.add(*word) == buffer);
                (self.buffer_free)(buffer);
                found.map(|word| word * size_of::<usize>())
            });
            (self.free)(context);
            found.flatten()
        }
    }
}
