//! Products of many rows, for `Fast`: by tiles, with factors rounded to halves and sums in f32.
//!
//! The order of a call: [`Many::halve`] the rows, then [`Many::matmul`] any number of jobs on them; or [`Many::group`] the
//! choices of a pass by expert, then [`Many::experts_up`] and [`Many::experts_down`] for each group of slots. A result depends
//! on its row and its weights only, never on what else is in the dispatch.
//!
//! Halves: a row is multiplied by a power of two that brings its largest magnitude below 2^15, so that no activation leaves
//! their range. Weights are not: one above 65504 becomes infinite (which the limits of SwiGLU hide), and below 6e-5 (2^-14) they
//! are multiples of 2^-24. The matrices of the model are far from both.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use minijinja::{Value, context};

use crate::GpuError;
use crate::format::Format;
use crate::jobs::{Jobs, Matrix};
use crate::kernel::{Commands, Kernels, Span};
use crate::self_check::Cooperative;

/// What a workgroup makes, and 32 threads of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) rows: u32,
    pub(crate) outputs: u32,
    /// Factors of each sum that are in workgroup memory at a time.
    pub(crate) depth: u32,
    /// 2 to fill one tile of factors while another is multiplied.
    pub(crate) buffers: u32,
    pub(crate) warp_rows: u32,
    pub(crate) warp_outputs: u32,
}

impl Tile {
    /// The tile of [`Many::matmul`].
    const PRODUCTS: Tile = Tile { rows: 128, outputs: 128, depth: 32, buffers: 1, warp_rows: 64, warp_outputs: 32 };
    /// The same for few rows, so that there are as many tiles as a large device has processors.
    const FEW_PRODUCTS: Tile = Tile { rows: 64, outputs: 64, depth: 64, buffers: 1, warp_rows: 32, warp_outputs: 32 };
    /// The same for many rows and weights of Q8_0 alone: of other types a thread holds too much of such a tile.
    const WIDE_PRODUCTS: Tile = Tile { outputs: 256, ..Tile::PRODUCTS };
    /// The tile of experts, which have fewer rows each.
    const EXPERTS: Tile = Tile { rows: 64, outputs: 128, depth: 32, buffers: 1, warp_rows: 64, warp_outputs: 32 };
    /// The same where the average expert has more rows than such a tile.
    const CROWDED_EXPERTS: Tile = Tile { rows: 128, outputs: 256, warp_outputs: 64, ..Tile::EXPERTS };

    /// Bytes of workgroup memory, but for the code book's.
    fn bytes(self, coop: bool) -> u32 {
        let factors = self.buffers * (self.rows + self.outputs) * (self.depth + 8) * 2;
        factors + if coop { self.threads() * 32 } else { 0 }
    }

    /// Threads of a workgroup.
    fn threads(self) -> u32 {
        32 * (self.rows / self.warp_rows) * (self.outputs / self.warp_outputs)
    }

    /// Values of a kernel made of such tiles that reads `formats`.
    fn context(self, coop: bool, formats: &[Format]) -> Value {
        let Tile { rows, outputs, depth, buffers, warp_rows, warp_outputs } = self;
        assert!(
            (outputs * depth).is_multiple_of(16 * self.threads()),
            "each thread brings as many pieces of 16 weights"
        );
        let types: Vec<&str> = formats.iter().map(|format| format.name()).collect();
        let type_ids: BTreeMap<&str, u32> = Format::ALL.iter().map(|&format| (format.name(), format as u32)).collect();
        context! { rows, outputs, depth, buffers, warp_rows, warp_outputs, coop, types, type_ids }
    }
}

/// Rows of activations as halves.
#[derive(Clone, Copy)]
pub(crate) struct Halves<'b> {
    /// `[rows, width]` halves.
    pub(crate) halves: Span<'b>,
    /// `[rows]`: what undoes each row's multiplication, f32.
    pub(crate) inverses: Span<'b>,
    pub(crate) rows: usize,
    /// Values of a row, a multiple of 4.
    pub(crate) width: usize,
}

/// Choices of a pass, grouped by expert.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'b> {
    /// `[choices]` words: choices of expert 0 in ascending order, those of expert 1...
    pub(crate) order: Span<'b>,
    /// Of [`Many::most_tiles_bytes`].
    pub(crate) tiles: Span<'b>,
    /// Rows times experts used.
    pub(crate) choices: usize,
}

/// Experts of a layer, those of them that are in slots of one slab.
#[derive(Clone, Copy)]
pub(crate) struct Experts<'b> {
    pub(crate) slab: Span<'b>,
    /// Slot of each expert, or `u32::MAX`.
    pub(crate) table: Span<'b>,
    /// Where the layer's slots begin in the table.
    pub(crate) table_at: u32,
    /// Vectors of a slot.
    pub(crate) slot: u32,
    /// In a slot, `[F, D]`.
    pub(crate) gate: Matrix,
    /// In a slot, `[F, D]`.
    pub(crate) up: Matrix,
    /// In a slot, `[D, F]`.
    pub(crate) down: Matrix,
    /// Experts of the layer.
    pub(crate) experts: usize,
    /// Experts that a row uses.
    pub(crate) used: usize,
    /// Limit of gate and up.
    pub(crate) limit: f32,
}

impl Experts<'_> {
    /// The power of two that experts' activations are multiplied by as halves: none is above `limit`².
    fn mid_scale(&self) -> f32 {
        let largest = self.limit * self.limit;
        if largest.is_normal() { (32768.0 / largest).log2().floor().clamp(-100.0, 100.0).exp2() } else { 1.0 }
    }
}

/// Bytes of IQ2_XXS's code book in workgroup memory.
const CODE_BOOK_BYTES: u32 = 2048;

/// Kernels of many rows.
pub(crate) struct Many {
    kernels: Arc<Kernels>,
    cooperative: Cooperative,
    tiles: Tiles,
}

/// Tiles for few rows and for many: which is used depends on numbers of rows and experts and on the adapter, and no bit of a
/// result on which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiles {
    few_products: Tile,
    products: Tile,
    wide_products: Tile,
    experts: Tile,
    crowded_experts: Tile,
}

impl Tiles {
    /// Rows up to which tiles of [`Tile::FEW_PRODUCTS`] are faster (docs/performance.md, "Prompts of few tokens").
    const FEW_PRODUCT_ROWS: usize = 128;
    /// Rows from which there are enough tiles of [`Tile::WIDE_PRODUCTS`] for a large device.
    const WIDE_ROWS: usize = 1024;

    /// For an adapter whose workgroups have so much memory: the large tiles are for cooperative matrices.
    fn of(cooperative: Cooperative, workgroup_bytes: u32) -> Tiles {
        let fits = |is_cooperative, tile: Tile| is_cooperative && tile.bytes(true) + CODE_BOOK_BYTES <= workgroup_bytes;
        let or = |is_cooperative, large, small| if fits(is_cooperative, large) { large } else { small };
        Tiles {
            few_products: Tile::FEW_PRODUCTS,
            products: Tile::PRODUCTS,
            wide_products: or(cooperative.products, Tile::WIDE_PRODUCTS, Tile::PRODUCTS),
            experts: Tile::EXPERTS,
            crowded_experts: or(cooperative.experts, Tile::CROWDED_EXPERTS, Tile::EXPERTS),
        }
    }

    fn products(&self, formats: &[Format], rows: usize) -> Tile {
        match rows {
            ..=Tiles::FEW_PRODUCT_ROWS => self.few_products,
            Tiles::WIDE_ROWS.. if formats == [Format::Q8_0] => self.wide_products,
            _ => self.products,
        }
    }

    fn experts(&self, choices: usize, experts: usize) -> Tile {
        let is_crowded = choices >= experts * self.experts.rows as usize;
        if is_crowded { self.crowded_experts } else { self.experts }
    }
}

impl Many {
    /// With cooperative matrices for the families of `cooperative`.
    pub(crate) fn new(kernels: Arc<Kernels>, cooperative: Cooperative) -> Many {
        let tiles = Tiles::of(cooperative, kernels.device().report().workgroup_bytes);
        Many { kernels, cooperative, tiles }
    }

    /// Makes the kernels of a model's layers, so that the first pass does not wait for them: `products` are the formats of each
    /// list of jobs, `layers` those of gate, up and down of experts.
    ///
    /// # Errors
    /// The driver does not take one.
    pub(crate) fn prepare(
        &self,
        products: impl IntoIterator<Item = Vec<Format>>,
        layers: impl IntoIterator<Item = [Format; 3]>,
        experts: usize,
        used: usize,
    ) -> Result<(), GpuError> {
        let tiles = self.tiles;
        let products: BTreeSet<Vec<Format>> = products.into_iter().collect();
        let layers: BTreeSet<[Format; 3]> = layers.into_iter().collect();
        let mut wanted = vec![("halves", context! {})];
        for formats in &products {
            wanted.extend(
                [1, Tiles::FEW_PRODUCT_ROWS + 1, usize::MAX]
                    .map(|rows| self.matmul_kernel(formats, tiles.products(formats, rows))),
            );
        }
        for tile in [tiles.experts, tiles.crowded_experts] {
            wanted.push(self.group_kernel(experts, tile));
            wanted.extend(layers.iter().map(|&[gate, up, _]| self.up_kernel(gate, up, used, tile)));
            wanted.extend(layers.iter().map(|&[_, _, down]| self.down_kernel(down, used, tile)));
        }
        // Each once.
        wanted.sort_by_cached_key(|(name, context)| format!("{name} {context}"));
        wanted.dedup_by_key(|(name, context)| format!("{name} {context}"));
        self.kernels.make_all(&wanted)
    }

    fn matmul_kernel(&self, formats: &[Format], tile: Tile) -> (&'static str, Value) {
        ("matmul", tile.context(self.cooperative.products, formats))
    }

    fn group_kernel(&self, experts: usize, tile: Tile) -> (&'static str, Value) {
        ("group", context! { experts, tile => tile.rows })
    }

    fn up_kernel(&self, gate: Format, up: Format, used: usize, tile: Tile) -> (&'static str, Value) {
        let tile = tile.context(self.cooperative.experts, &both(gate, up));
        ("experts_up_many", context! { gate => gate.name(), up => up.name(), used, ..tile })
    }

    fn down_kernel(&self, down: Format, used: usize, tile: Tile) -> (&'static str, Value) {
        let tile = tile.context(self.cooperative.experts, &[down]);
        ("experts_down_many", context! { down => down.name(), used, ..tile })
    }

    /// Makes `to` of `to.rows` rows of f32, a row every `x_stride` values (a multiple of 4).
    ///
    /// # Errors
    /// The driver does not take the kernel.
    pub(crate) fn halve(
        &self,
        commands: &mut Commands,
        x: Span<'_>,
        x_stride: usize,
        to: Halves<'_>,
    ) -> Result<(), GpuError> {
        let kernel = self.kernels.get("halves", context! {})?;
        let params = [x_stride as u32 / 4, to.width as u32 / 4];
        commands.run(&kernel, &[x, to.halves, to.inverses], &params, [1, to.rows as u32, 1]);
        Ok(())
    }

    /// Every job of `jobs`, whose matrices and table are in `slab`: `[rows, y_stride]` f32.
    ///
    /// # Errors
    /// The driver does not take the kernel.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn matmul(
        &self,
        commands: &mut Commands,
        slab: Span<'_>,
        jobs: &Jobs,
        x: Halves<'_>,
        y: Span<'_>,
        y_stride: usize,
        code_book: Span<'_>,
    ) -> Result<(), GpuError> {
        let formats = jobs.formats();
        let tile = self.tiles.products(&formats, x.rows);
        let (name, context) = self.matmul_kernel(&formats, tile);
        let kernel = self.kernels.get(name, context)?;
        let params = [jobs.table, x.rows as u32, x.width as u32 / 4, y_stride as u32];
        let groups = [jobs.groups(tile.outputs as usize), (x.rows as u32).div_ceil(tile.rows), 1];
        let buffers = with_code_book(&[slab, x.halves, x.inverses, y], &formats, code_book);
        commands.run(&kernel, &buffers, &params, groups);
        Ok(())
    }

    /// Bytes of [`Groups::tiles`] for the tiles that every device has.
    pub(crate) fn most_tiles_bytes(choices: usize, experts: usize) -> u64 {
        16 * (1 + (experts.min(choices) + choices / Tile::EXPERTS.rows as usize) as u64)
    }

    /// Tiles that `choices` of `experts` can make at most.
    fn most_tiles(&self, choices: usize, experts: usize) -> u32 {
        (experts.min(choices) + choices / self.tiles.experts(choices, experts).rows as usize) as u32
    }

    /// Bytes of [`Groups::tiles`].
    #[cfg(test)]
    pub(crate) fn tiles_bytes(&self, choices: usize, experts: usize) -> u64 {
        16 * (1 + u64::from(self.most_tiles(choices, experts)))
    }

    /// Groups the choices of a pass, `chosen` expert ids `[rows, used]`.
    ///
    /// # Errors
    /// The driver does not take the kernel.
    pub(crate) fn group(
        &self,
        commands: &mut Commands,
        chosen: Span<'_>,
        experts: usize,
        to: Groups<'_>,
    ) -> Result<(), GpuError> {
        let (name, context) = self.group_kernel(experts, self.tiles.experts(to.choices, experts));
        let kernel = self.kernels.get(name, context)?;
        commands.run(&kernel, &[chosen, to.order, to.tiles], &(to.choices as u32), [experts as u32, 1, 1]);
        Ok(())
    }

    /// The activations of all choices whose expert is in a slot, into `mid`: `[choices, F]` halves in the groups' order.
    ///
    /// # Errors
    /// The driver does not take the kernel.
    pub(crate) fn experts_up(
        &self,
        commands: &mut Commands,
        of: &Experts<'_>,
        groups: Groups<'_>,
        x: Halves<'_>,
        mid: Span<'_>,
        code_book: Span<'_>,
    ) -> Result<(), GpuError> {
        #[derive(Clone, Copy, Pod, Zeroable)]
        #[repr(C)]
        struct Params {
            slot: u32,
            gate: u32,
            up: u32,
            gate_stride: u32,
            up_stride: u32,
            chunks: u32,
            width: u32,
            limit: f32,
            table: u32,
            scale: f32,
        }
        let (gate, up) = (of.gate, of.up);
        assert_eq!(x.width, gate.cols, "rows hold what experts take and nothing else");
        let formats = both(gate.format, up.format);
        let tile = self.tiles.experts(groups.choices, of.experts);
        let (name, context) = self.up_kernel(gate.format, up.format, of.used, tile);
        let kernel = self.kernels.get(name, context)?;
        let params = Params {
            slot: of.slot,
            gate: gate.base,
            up: up.base,
            gate_stride: gate.stride,
            up_stride: up.stride,
            chunks: gate.cols as u32 / 32,
            width: gate.rows as u32,
            limit: of.limit,
            table: of.table_at,
            scale: of.mid_scale(),
        };
        let buffers = [of.slab, of.table, groups.order, groups.tiles, x.halves, x.inverses, mid];
        let buffers = with_code_book(&buffers, &formats, code_book);
        let columns = params.width.div_ceil(tile.outputs / 2);
        commands.run(&kernel, &buffers, &params, [columns, self.most_tiles(groups.choices, of.experts), 1]);
        Ok(())
    }

    /// The results of all choices whose expert is in a slot, of what [`Many::experts_up`] made, times their weights
    /// (`shares`, `[rows, used]` f32): choice `k` of row `r` at place `[r][1 + k]` of `[rows, 1 + used, D]` f32.
    ///
    /// # Errors
    /// The driver does not take the kernel.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn experts_down(
        &self,
        commands: &mut Commands,
        of: &Experts<'_>,
        groups: Groups<'_>,
        mid: Span<'_>,
        shares: Span<'_>,
        outputs: Span<'_>,
        code_book: Span<'_>,
    ) -> Result<(), GpuError> {
        #[derive(Clone, Copy, Pod, Zeroable)]
        #[repr(C)]
        struct Params {
            slot: u32,
            down: u32,
            stride: u32,
            chunks: u32,
            d: u32,
            table: u32,
            inverse: f32,
        }
        let down = of.down;
        let formats = [down.format];
        let tile = self.tiles.experts(groups.choices, of.experts);
        let (name, context) = self.down_kernel(down.format, of.used, tile);
        let kernel = self.kernels.get(name, context)?;
        let params = Params {
            slot: of.slot,
            down: down.base,
            stride: down.stride,
            chunks: down.cols as u32 / 32,
            d: down.rows as u32,
            table: of.table_at,
            inverse: 1.0 / of.mid_scale(),
        };
        let buffers = [of.slab, of.table, groups.order, groups.tiles, mid, shares, outputs];
        let buffers = with_code_book(&buffers, &formats, code_book);
        let columns = params.d.div_ceil(tile.outputs);
        commands.run(&kernel, &buffers, &params, [columns, self.most_tiles(groups.choices, of.experts), 1]);
        Ok(())
    }
}

fn both(a: Format, b: Format) -> Vec<Format> {
    Format::ALL.into_iter().filter(|&format| format == a || format == b).collect()
}

/// Kernels that read IQ2_XXS have its code book last.
fn with_code_book<'b>(buffers: &[Span<'b>], formats: &[Format], code_book: Span<'b>) -> Vec<Span<'b>> {
    let mut buffers = buffers.to_vec();
    buffers.extend(formats.contains(&Format::Iq2Xxs).then_some(code_book));
    buffers
}

#[cfg(test)]
#[path = "matmul_tests.rs"]
pub(crate) mod tests;
