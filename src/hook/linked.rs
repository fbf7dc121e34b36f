//! The function table of the llama.cpp that is linked into this binary.

use super::device::DeviceTable;
use super::table::{GgmlTable, RawTensor};
use llama_cpp_sys_2 as sys;
use std::ffi::{c_char, c_void};

impl GgmlTable {
    /// The functions of the llama.cpp inside `llama-cpp-sys-2`, with its layout of `ggml_tensor`.
    pub fn linked() -> Self {
        Self {
            name,
            op_description,
            n_elements,
            n_rows,
            n_bytes,
            is_contiguous,
            tensor_read,
            tensor_write,
            device: Some(DeviceTable::linked()),
        }
    }
}

// SAFETY (of every function here): a `RawTensor` pointer is a `ggml_tensor` of this same llama.cpp, valid during the call; the
// callers in `table.rs` get them from llama.cpp's callback only.

unsafe extern "C" fn name(tensor: *const RawTensor) -> *const c_char {
    // SAFETY: see the top of the file.
    unsafe { sys::ggml_get_name(tensor.cast()) }
}

unsafe extern "C" fn op_description(tensor: *const RawTensor) -> *const c_char {
    // SAFETY: see the top of the file.
    unsafe { sys::ggml_op_desc(tensor.cast()) }
}

unsafe extern "C" fn n_elements(tensor: *const RawTensor) -> i64 {
    // SAFETY: see the top of the file.
    unsafe { sys::ggml_nelements(tensor.cast()) }
}

unsafe extern "C" fn n_rows(tensor: *const RawTensor) -> i64 {
    // SAFETY: see the top of the file.
    unsafe { sys::ggml_nrows(tensor.cast()) }
}

unsafe extern "C" fn n_bytes(tensor: *const RawTensor) -> usize {
    // SAFETY: see the top of the file.
    unsafe { sys::ggml_nbytes(tensor.cast()) }
}

unsafe extern "C" fn is_contiguous(tensor: *const RawTensor) -> bool {
    // SAFETY: see the top of the file.
    unsafe { sys::ggml_is_contiguous(tensor.cast()) }
}

unsafe extern "C" fn tensor_read(tensor: *const RawTensor, data: *mut c_void, offset: usize, size: usize) {
    // SAFETY: see the top of the file; the caller guarantees `size` bytes at `data` and in the tensor from `offset`.
    unsafe { sys::ggml_backend_tensor_get(tensor.cast(), data, offset, size) }
}

unsafe extern "C" fn tensor_write(tensor: *mut RawTensor, data: *const c_void, offset: usize, size: usize) {
    // SAFETY: as in `tensor_read`.
    unsafe { sys::ggml_backend_tensor_set(tensor.cast(), data, offset, size) }
}
