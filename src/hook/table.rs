//! The ggml functions that the hook needs, in one table: linked in, or looked up by name in the llama.cpp that a process has loaded.

use super::device::DeviceTable;
use std::ffi::{CStr, c_char, c_void};
use std::marker::PhantomData;
use std::ops::Range;

/// llama.cpp's `ggml_tensor`, seen only through [`GgmlTable`].
#[repr(C)]
pub struct RawTensor {
    opaque: [u8; 0],
    not_send: PhantomData<*mut u8>,
}

type Text = unsafe extern "C" fn(*const RawTensor) -> *const c_char;
type Count = unsafe extern "C" fn(*const RawTensor) -> i64;
type Size = unsafe extern "C" fn(*const RawTensor) -> usize;
type Test = unsafe extern "C" fn(*const RawTensor) -> bool;
type Read = unsafe extern "C" fn(*const RawTensor, *mut c_void, usize, usize);
type Write = unsafe extern "C" fn(*mut RawTensor, *const c_void, usize, usize);

/// Functions of ggml's public C API.
///
/// Where a tensor's data lie and what a node reads no function tells. A [`DeviceTable`] finds that out; without one, as from [`lookup`](Self::lookup) alone,
/// residuals go by copy, and rows are taken to be in batch order.
#[derive(Clone, Copy)]
pub struct GgmlTable {
    pub(super) name: Text,
    pub(super) op_description: Text,
    pub(super) n_elements: Count,
    pub(super) n_rows: Count,
    pub(super) n_bytes: Size,
    pub(super) is_contiguous: Test,
    pub(super) tensor_read: Read,
    pub(super) tensor_write: Write,
    /// What a graph on the residual's own device needs, and where tensors keep what no function tells.
    pub(super) device: Option<&'static DeviceTable>,
}

/// A function that the llama.cpp at hand does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this llama.cpp has no function `{symbol}`, which the guard needs")]
pub struct MissingSymbol {
    pub symbol: String,
}

impl GgmlTable {
    /// Takes the functions from `resolve`, which gives the address of a symbol or null.
    ///
    /// # Safety
    /// A non-null address that `resolve` gives for a name must be that function of ggml's C API, and stay loaded for as long as
    /// the table is used.
    ///
    /// # Errors
    /// The first function that `resolve` does not find.
    pub unsafe fn lookup(mut resolve: impl FnMut(&CStr) -> *const c_void) -> Result<Self, MissingSymbol> {
        macro_rules! function {
            ($symbol:literal, $signature:ty) => {{
                let address = resolve($symbol);
                if address.is_null() {
                    return Err(MissingSymbol { symbol: $symbol.to_string_lossy().into_owned() });
                }
                // SAFETY: not null; the caller guarantees that it is the function of that name, whose C signature is the field's.
                unsafe { std::mem::transmute::<*const c_void, $signature>(address) }
            }};
        }
        Ok(Self {
            name: function!(c"ggml_get_name", Text),
            op_description: function!(c"ggml_op_desc", Text),
            n_elements: function!(c"ggml_nelements", Count),
            n_rows: function!(c"ggml_nrows", Count),
            n_bytes: function!(c"ggml_nbytes", Size),
            is_contiguous: function!(c"ggml_is_contiguous", Test),
            tensor_read: function!(c"ggml_backend_tensor_get", Read),
            tensor_write: function!(c"ggml_backend_tensor_set", Write),
            device: None,
        })
    }
}

impl GgmlTable {
    /// With the functions for graphs on a device, of the same llama.cpp, and what it knows of the layout of tensors.
    #[must_use]
    pub fn with_device(self, device: &'static DeviceTable) -> Self {
        Self { device: Some(device), ..self }
    }

    /// The data of `tensor` where they lie in host memory, else null, as where that can't be told.
    ///
    /// # Safety
    /// `tensor` must be a valid tensor of this table's llama.cpp.
    pub(super) unsafe fn host_data(&self, tensor: *const RawTensor) -> *mut c_void {
        // SAFETY: guaranteed by the caller.
        unsafe { self.device.map_or(std::ptr::null_mut(), |device| device.host_data(tensor)) }
    }

    /// `src[1]` of `tensor`, or null, as where that can't be told.
    ///
    /// # Safety
    /// As of [`host_data`](Self::host_data).
    unsafe fn second_source(&self, tensor: *const RawTensor) -> *const RawTensor {
        // SAFETY: guaranteed by the caller.
        unsafe { self.device.map_or(std::ptr::null(), |device| device.second_source(tensor)) }
    }
}

/// A tensor that llama.cpp shows its callback, for as long as the callback runs.
#[derive(Clone, Copy)]
pub struct Tensor<'call> {
    raw: *mut RawTensor,
    table: &'call GgmlTable,
}

/// How a residual's bytes can be had.
pub enum TensorBytes<'call> {
    /// In host memory, where they can be patched in place.
    Host(&'call mut [f32]),
    /// Elsewhere: they go by copy.
    Device,
}

impl<'call> Tensor<'call> {
    /// # Safety
    /// `raw` must be a tensor of the llama.cpp that `table` belongs to, valid for `'call`.
    pub(super) unsafe fn new(raw: *mut RawTensor, table: &'call GgmlTable) -> Self {
        Self { raw, table }
    }

    /// The tensor's name, as `l_out-12`.
    pub fn name(&self) -> &'call CStr {
        // SAFETY: `raw` is valid for 'call (see `new`), and so is the name, which lies inside the tensor and always ends in a NUL.
        unsafe { CStr::from_ptr((self.table.name)(self.raw)) }
    }

    pub(super) fn raw(&self) -> *const RawTensor {
        self.raw
    }

    pub(super) fn table(&self) -> &'call GgmlTable {
        self.table
    }

    /// Whether this is a rotary position embedding, whose second source holds the positions.
    pub(super) fn is_rope(&self) -> bool {
        // SAFETY: `raw` is valid for 'call; ggml gives a static string.
        unsafe { CStr::from_ptr((self.table.op_description)(self.raw)) == c"ROPE" }
    }

    /// Whether this looks rows up by index: for token embeddings, its second source holds the token ids.
    pub(super) fn is_row_lookup(&self) -> bool {
        // SAFETY: as above.
        unsafe { CStr::from_ptr((self.table.op_description)(self.raw)) == c"GET_ROWS" }
    }

    /// `src[1]`, where the table can tell.
    pub(super) fn second_source(&self) -> Option<*const RawTensor> {
        // SAFETY: `raw` is valid for 'call.
        let source = unsafe { self.table.second_source(self.raw) };
        (!source.is_null()).then_some(source)
    }

    pub fn n_rows(&self) -> usize {
        // SAFETY: `raw` is valid for 'call.
        unsafe { (self.table.n_rows)(self.raw) as usize }
    }

    pub fn n_elements(&self) -> usize {
        // SAFETY: `raw` is valid for 'call.
        unsafe { (self.table.n_elements)(self.raw) as usize }
    }

    /// Why this tensor can't be taken for `[n_rows, width]` contiguous four-byte values, if it can't.
    pub(super) fn shape_problem(&self, width: usize) -> Option<String> {
        // SAFETY: `raw` is valid for 'call.
        let (n_bytes, contiguous) = unsafe { ((self.table.n_bytes)(self.raw), (self.table.is_contiguous)(self.raw)) };
        let (n_elements, n_rows) = (self.n_elements(), self.n_rows());
        if !contiguous {
            Some("its rows are not contiguous".into())
        } else if n_bytes != n_elements * size_of::<f32>() {
            Some(format!("{n_elements} values take {n_bytes} bytes, so they are not 32-bit floats"))
        } else if n_elements != n_rows * width {
            Some(format!("{n_rows} rows hold {n_elements} values, expected {width} a row"))
        } else {
            None
        }
    }

    /// The tensor's values, in place where they lie in host memory.
    ///
    /// # Safety
    /// The tensor must have passed [`shape_problem`](Self::shape_problem), and nothing else may use its data while the slice lives:
    /// inside the callback llama.cpp has synchronised the backend and waits.
    pub(super) unsafe fn bytes(&mut self) -> TensorBytes<'call> {
        // SAFETY: `raw` is valid for 'call.
        let data = unsafe { self.table.host_data(self.raw) };
        if data.is_null() {
            return TensorBytes::Device;
        }
        // SAFETY: the buffer holds n_elements contiguous f32 (checked by the caller through `shape_problem`), ggml aligns tensor
        // data to 32 bytes, and the caller guarantees that nobody else touches them during 'call.
        TensorBytes::Host(unsafe { std::slice::from_raw_parts_mut(data.cast::<f32>(), self.n_elements()) })
    }

    /// Copies the tensor's values to `values`, wherever they lie.
    ///
    /// # Safety
    /// The tensor must have passed [`shape_problem`](Self::shape_problem).
    ///
    /// # Panics
    /// If `values` has another length than the tensor.
    pub(super) unsafe fn read(&self, values: &mut [f32]) {
        assert_eq!(values.len(), self.n_elements(), "reading `{:?}`", self.name());
        // SAFETY: the tensor holds exactly this many bytes from offset 0 (`shape_problem`, and the assertion).
        unsafe { (self.table.tensor_read)(self.raw, values.as_mut_ptr().cast(), 0, size_of_val(values)) }
    }

    /// Copies `values` over the tensor's, wherever they lie.
    ///
    /// # Safety
    /// The tensor must have passed [`shape_problem`](Self::shape_problem), and nothing else may use its data meanwhile.
    ///
    /// # Panics
    /// If `values` has another length than the tensor.
    pub(super) unsafe fn write(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.n_elements(), "writing `{:?}`", self.name());
        // SAFETY: as in `read`; the caller guarantees that nobody else touches the data.
        unsafe { (self.table.tensor_write)(self.raw, values.as_ptr().cast(), 0, size_of_val(values)) }
    }
}

impl Tensor<'_> {
    /// Makes a range of the tensor's values zero, wherever they lie.
    ///
    /// # Safety
    /// As of [`write`](Self::write).
    ///
    /// # Panics
    /// If the tensor has no such values.
    pub(super) unsafe fn zero(&mut self, range: Range<usize>) {
        assert!(range.end <= self.n_elements(), "zeroing {range:?} of `{:?}`", self.name());
        let zeros = vec![0f32; range.len()];
        let start = range.start * size_of::<f32>();
        // SAFETY: the range lies in the tensor (the assertion); the caller guarantees that nobody else touches the data.
        unsafe { (self.table.tensor_write)(self.raw, zeros.as_ptr().cast(), start, size_of_val(&*zeros)) }
    }
}

/// Reads the I32 tensor `raw` into `values`, or says that it is no plain list of 32-bit values.
///
/// # Safety
/// `raw` must be a valid tensor of the llama.cpp that `table` belongs to, with its data computed or set.
pub(super) unsafe fn read_i32(table: &GgmlTable, raw: *const RawTensor, values: &mut Vec<i32>) -> bool {
    // SAFETY: the caller guarantees that `raw` is valid.
    let (n_elements, n_bytes, contiguous) =
        unsafe { ((table.n_elements)(raw), (table.n_bytes)(raw), (table.is_contiguous)(raw)) };
    let n_elements = n_elements as usize;
    if !contiguous || n_bytes != n_elements * size_of::<i32>() {
        return false;
    }
    values.resize(n_elements, 0);
    // SAFETY: `values` has room for exactly the tensor's bytes.
    unsafe { (table.tensor_read)(raw, values.as_mut_ptr().cast(), 0, n_bytes) };
    true
}
