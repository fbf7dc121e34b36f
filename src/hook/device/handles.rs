//! What is made by ggml and freed when it is dropped.

use super::super::table::RawTensor;
use super::table::{DeviceTable, F32, InitParams, RawAllocator, RawBackend, RawBuffer, RawContext, RawDevice};
use std::ptr::NonNull;

macro_rules! handle {
    ($($(#[$doc:meta])* $name:ident($raw:ty) freed by $free:ident;)*) => {$(
        $(#[$doc])*
        pub(super) struct $name {
            raw: NonNull<$raw>,
            table: &'static DeviceTable,
        }

        impl $name {
            /// # Safety
            /// `raw` must be null or a thing of this kind that nobody else frees, made by the table's llama.cpp.
            unsafe fn owned(raw: *mut $raw, table: &'static DeviceTable) -> Option<Self> {
                NonNull::new(raw).map(|raw| Self { raw, table })
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: it is owned (`owned`), and freed here alone.
                unsafe { (self.table.$free)(self.raw.as_ptr()) }
            }
        }
    )*};
}

handle! {
    /// Memory of tensors and graphs, which hold no data of their own there.
    Context(RawContext) freed by free;
    /// Data of tensors on a device. Tensors in it must not be used after it.
    Buffer(RawBuffer) freed by buffer_free;
    /// A stream of work on a device. Buffers and allocators of the device may outlive it.
    Backend(RawBackend) freed by backend_free;
    /// Memory of a graph's intermediate values.
    Allocator(RawAllocator) freed by allocator_free;
}

macro_rules! raw {
    ($($name:ident($raw:ty);)*) => {$(
        impl $name {
            pub fn raw(&self) -> *mut $raw {
                self.raw.as_ptr()
            }
        }
    )*};
}

raw! {
    Context(RawContext);
    Backend(RawBackend);
    Allocator(RawAllocator);
}

impl Context {
    /// Room for `n_tensors`, and for a graph of `n_nodes` if there are to be any.
    pub fn new(table: &'static DeviceTable, n_tensors: usize, n_nodes: usize) -> Option<Self> {
        // SAFETY: plain use of ggml; the context is owned here.
        unsafe {
            let graph = if n_nodes > 0 { (table.graph_overhead)(n_nodes, false) } else { 0 };
            let mem_size = n_tensors * (table.tensor_overhead)() + graph;
            Self::owned((table.init)(InitParams { mem_size, mem_buffer: std::ptr::null_mut(), no_alloc: true }), table)
        }
    }

    /// A new tensor of 32-bit floats, `[n_rows, width]`, without memory.
    pub fn tensor(&self, width: usize, n_rows: usize) -> *mut RawTensor {
        // SAFETY: the context is valid; whoever makes one leaves room for its tensors.
        unsafe { (self.table.new_2d)(self.raw(), F32, width as i64, n_rows as i64) }
    }

    /// Memory on the backend's device for all tensors that have none. `None` where the device has no room.
    pub fn allocate(&self, backend: &Backend) -> Option<Buffer> {
        // SAFETY: both are valid; the buffer is owned here.
        unsafe { Buffer::owned((self.table.allocate_all)(self.raw(), backend.raw()), self.table) }
    }
}

impl Backend {
    /// # Safety
    /// `device` must be a device of the table's llama.cpp.
    pub unsafe fn new(table: &'static DeviceTable, device: *mut RawDevice) -> Option<Self> {
        // SAFETY: guaranteed by the caller; the backend is owned here.
        unsafe { Self::owned((table.device_init)(device, std::ptr::null()), table) }
    }
}

impl Allocator {
    /// Memory of the kind that `backend` likes best.
    pub fn new(table: &'static DeviceTable, backend: &Backend) -> Option<Self> {
        // SAFETY: the backend is valid; the allocator is owned here.
        unsafe { Self::owned((table.allocator_new)((table.backend_buffer_type)(backend.raw())), table) }
    }

    /// Bytes that it holds.
    pub fn size(&self) -> usize {
        // SAFETY: it is valid, and has one buffer.
        unsafe { (self.table.allocator_size)(self.raw(), 0) }
    }
}
