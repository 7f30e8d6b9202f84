//! How much memory a model will take on a device, told from its header alone, before anything is loaded.
//!
//! The numbers come from the code that allocates: it makes buffers from a function, and here that function only counts.

use std::cell::Cell;

use model::{Config, Error, KvLayout, Model};

use crate::GpuError;
use crate::backend::check_sizes;
use crate::device::AdapterReport;
use crate::experts;
use crate::format;
use crate::kernel::Buffer;
use crate::matmul::Many;
use crate::pass::{Activations, FEW_ROWS, Make, Shapes, room};
use crate::state::{LayerPlaces, room_tokens, state_bytes};
use crate::upload::MAPPED_BYTES;
use crate::weights::{LayerWeights, place_head, place_layer};

/// Device memory that no buffer of a model is: pipelines, blocks of the allocator that are not full, the driver's own.
pub const DRIVER_BYTES: u64 = 256 << 20;

/// Host memory that weights go through on their way to the device.
pub const UPLOAD_BYTES: u64 = MAPPED_BYTES as u64;

/// What is to be room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Rows of the largest pass.
    pub rows: usize,
    /// Rows of it whose logits are wanted.
    pub wanted_rows: usize,
    /// Tokens that a session may grow to.
    pub end_tokens: usize,
}

/// Bytes of device memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceBytes {
    /// Weights that every token uses, and tables.
    pub fixed: u64,
    /// A session that has grown.
    pub session: u64,
    /// Activations of the largest pass, and of one of a few tokens.
    pub pass: u64,
    /// An expert of each layer.
    pub slots: Vec<u64>,
    /// All experts.
    pub experts: u64,
    /// Whether a kernel can reach all experts of a layer at once: else they cannot be resident.
    pub can_be_resident: bool,
}

/// What `model` needs on an adapter.
///
/// # Errors
/// The model has sizes or types without kernels, or something does not fit into one buffer of the adapter.
pub fn device_bytes(model: &Model, layout: &KvLayout, room: Room, on: &AdapterReport) -> Result<DeviceBytes, Error> {
    check_sizes(&model.config)?;
    let layers: Vec<LayerWeights<u64>> = (0..model.config.layers)
        .map(|layer| {
            let what = format!("the weights of layer {layer}");
            place_layer(model, layer, 1.0, |placer| Ok(Buffer::room(on, &what, placer.bytes)?))
        })
        .collect::<Result<_, Error>>()?;
    let head = place_head(model, |placer| Ok(Buffer::room(on, "the output head", placer.bytes)?))?.slab;
    let tables = format::code_book().len() + 4 * model.config.layers * model.config.experts;
    let slots = experts::slot_bytes(model)?;
    let of_layer = |slot: &u64| slot * model.config.experts as u64;
    check_session(layout, room.end_tokens, on)?;
    Ok(DeviceBytes {
        fixed: layers.iter().map(|layer| layer.slab).sum::<u64>() + head + tables as u64,
        session: state_bytes(layout, room.end_tokens),
        pass: pass_bytes(&model.config, layout, &layers, room, on)?,
        experts: slots.iter().map(of_layer).sum(),
        can_be_resident: slots.iter().map(of_layer).all(|bytes| bytes <= on.binding_bytes),
        slots,
    })
}

fn pass_bytes(
    config: &Config,
    layout: &KvLayout,
    layers: &[LayerWeights<u64>],
    wanted: Room,
    on: &AdapterReport,
) -> Result<u64, GpuError> {
    let shapes = Shapes::new(config, layout, layers, Many::most_tiles_bytes);
    let total = Cell::new(0);
    let count: &Make<'_, ()> = &|what, bytes| {
        total.set(total.get() + Buffer::room(on, what, bytes)?);
        Ok(())
    };
    // Both kinds of passes are kept.
    let mut kinds = vec![room(wanted.rows, wanted.end_tokens), room(FEW_ROWS, wanted.end_tokens)];
    kinds.dedup();
    for (rows, end) in kinds {
        Activations::new(count, &shapes, rows, end)?;
    }
    count("logits", 4 * (wanted.wanted_rows * config.vocab_size) as u64)?;
    Ok(total.get())
}

/// A layer's part of a session is one buffer.
fn check_session(layout: &KvLayout, tokens: usize, on: &AdapterReport) -> Result<(), GpuError> {
    let largest = layout.layers.iter().map(|layer| LayerPlaces::new(layer, layout.window).bytes(room_tokens(tokens)));
    let what = format!("a layer's part of a session of {tokens} tokens");
    Buffer::room(on, &what, largest.max().unwrap_or(0)).map(|_| ())
}
