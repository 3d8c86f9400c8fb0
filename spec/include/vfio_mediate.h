// The ABI between vfio-mediate and a plug-in, version 1. Generated from sdk/src/abi; do not edit.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// A plug-in exports one symbol, `const struct vfio_mediate_entry vfio_mediate_plugin`; examples/c-plugin is a whole one.
// The rules that hold for every function (status, ownership, threads, re-entrancy, sizes) are in spec/plugin-abi.md.


#ifndef VFIO_MEDIATE_H
#define VFIO_MEDIATE_H

#include <stddef.h>
#include <stdint.h>

// "VFIOMED1" read as a little-endian number: vfio_mediate_entry.magic
#define VFIO_MEDIATE_ENTRY_MAGIC UINT64_C(0x3144454d4f494656)

// A hash over names, sizes and offsets of every structure below: vfio_mediate_entry.fingerprint
#define VFIO_MEDIATE_ABI_FINGERPRINT UINT64_C(0xdad2405eb85ea5b7)

struct vfio_mediate_access;
struct vfio_mediate_bytes;
struct vfio_mediate_call_context;
struct vfio_mediate_device_identity;
struct vfio_mediate_device_match;
struct vfio_mediate_device_ops;
struct vfio_mediate_dirty_ops;
struct vfio_mediate_entry;
struct vfio_mediate_event;
struct vfio_mediate_extra_irq;
struct vfio_mediate_extra_region;
struct vfio_mediate_host_services;
struct vfio_mediate_iova_range;
struct vfio_mediate_irq_claim;
struct vfio_mediate_irq_hooks;
struct vfio_mediate_irq_info;
struct vfio_mediate_irq_request;
struct vfio_mediate_migration_ops;
struct vfio_mediate_mmap_request;
struct vfio_mediate_plugin;
struct vfio_mediate_reason;
struct vfio_mediate_region_claim;
struct vfio_mediate_region_hooks;
struct vfio_mediate_region_info;
struct vfio_mediate_remaining;
struct vfio_mediate_scratch;


// `vfio_mediate_device_identity.backend`: VFIO group with a type1 container.
#define VFIO_MEDIATE_BACKEND_VFIO_GROUP 1

// `vfio_mediate_device_identity.backend`: VFIO character device with iommufd.
#define VFIO_MEDIATE_BACKEND_VFIO_CDEV 2

// `vfio_mediate_device_identity.backend`: a simulated device.
#define VFIO_MEDIATE_BACKEND_SIM 3

// `vfio_mediate_region_claim.maps`: the claim holds in normal running.
#define VFIO_MEDIATE_MAP_NORMAL (1 << 0)

// `vfio_mediate_region_claim.maps`: the claim holds while dirty pages are tracked.
#define VFIO_MEDIATE_MAP_TRACKING (1 << 1)

// `vfio_mediate_event.kind`: the device is about to be reset.
#define VFIO_MEDIATE_EVENT_RESET_PREPARE 1

// `vfio_mediate_event.kind`: the device was reset.
#define VFIO_MEDIATE_EVENT_RESET_DONE 2

// `vfio_mediate_event.kind`: `args` = iova, length in bytes, 1 if the device may write.
#define VFIO_MEDIATE_EVENT_DMA_MAP 3

// `vfio_mediate_event.kind`: `args` = iova, length in bytes.
#define VFIO_MEDIATE_EVENT_DMA_UNMAP 4

// `vfio_mediate_event.kind`: `args[0]` = 1 when COMMAND's bus-master bit went on, 0 when it went off.
#define VFIO_MEDIATE_EVENT_BUS_MASTER 5

// `vfio_mediate_event.kind`: `args[0]` = 1 entering low power, 0 leaving it.
#define VFIO_MEDIATE_EVENT_POWER 6

// `vfio_mediate_event.kind`: a front-end client came.
#define VFIO_MEDIATE_EVENT_CLIENT_ATTACH 7

// `vfio_mediate_event.kind`: a front-end client went.
#define VFIO_MEDIATE_EVENT_CLIENT_DETACH 8

// `vfio_mediate_event.kind`: the device reported an error or was failed; `args[0]` = errno.
#define VFIO_MEDIATE_EVENT_DEVICE_ERROR 9

// `vfio_mediate_event.kind`: a timer of this device fired; `args[0]` = its cookie.
#define VFIO_MEDIATE_EVENT_TIMER 10

// A plug-in loads when its major version equals the host's.
#define VFIO_MEDIATE_ABI_MAJOR 1

// Raised with every new extension; a host takes any minor version.
#define VFIO_MEDIATE_ABI_MINOR 0

// `vfio_mediate_entry.flags`: a panic in this plug-in aborts the process (`panic=abort`), so that the host cannot contain it.
#define VFIO_MEDIATE_ENTRY_PANIC_ABORTS (1 << 0)

// Matches every id, as in the kernel's `PCI_ANY_ID`.
#define VFIO_MEDIATE_ANY_ID 4294967295

// `vfio_mediate_plugin.probe`: not mine. The next plug-in is asked, then the device passes through plainly.
#define VFIO_MEDIATE_PROBE_DECLINE 0

// `vfio_mediate_plugin.probe`: mine.
#define VFIO_MEDIATE_PROBE_CLAIM 1

// A verdict: the hook did it all.
#define VFIO_MEDIATE_VERDICT_HANDLED 0

// A verdict: the host goes on with the device's own behaviour, with the data as the hook left them.
#define VFIO_MEDIATE_VERDICT_FORWARD 1

// `set_irqs`: `vfio_mediate_irq_request.action`, as `VFIO_IRQ_SET_ACTION_*` without the shift.
#define VFIO_MEDIATE_IRQ_MASK 0

#define VFIO_MEDIATE_IRQ_UNMASK 1

#define VFIO_MEDIATE_IRQ_TRIGGER 2

// `vfio_mediate_irq_request.data_kind`: none.
#define VFIO_MEDIATE_IRQ_DATA_NONE 0

// `vfio_mediate_irq_request.data_kind`: `bools` holds `count` bytes, 0 or 1.
#define VFIO_MEDIATE_IRQ_DATA_BOOL 1

// `vfio_mediate_irq_request.data_kind`: `fds` holds `count` descriptors, -1 for none. They stay the host's.
#define VFIO_MEDIATE_IRQ_DATA_EVENTFD 2

// Device states, as `enum vfio_device_mig_state`.
#define VFIO_MEDIATE_STATE_ERROR 0

#define VFIO_MEDIATE_STATE_STOP 1

#define VFIO_MEDIATE_STATE_RUNNING 2

#define VFIO_MEDIATE_STATE_STOP_COPY 3

#define VFIO_MEDIATE_STATE_RESUMING 4

#define VFIO_MEDIATE_STATE_RUNNING_P2P 5

#define VFIO_MEDIATE_STATE_PRE_COPY 6

#define VFIO_MEDIATE_STATE_PRE_COPY_P2P 7

// `vfio_mediate_migration_ops.flags`, as `VFIO_MIGRATION_*`. STOP_COPY is mandatory.
#define VFIO_MEDIATE_MIGRATION_STOP_COPY (1 << 0)

#define VFIO_MEDIATE_MIGRATION_P2P (1 << 1)

#define VFIO_MEDIATE_MIGRATION_PRE_COPY (1 << 2)

// `save`: bytes were written, more may follow.
#define VFIO_MEDIATE_SAVE_MORE 0

// `save`: the stream has ended (STOP_COPY), or has nothing more for now (PRE_COPY).
#define VFIO_MEDIATE_SAVE_END 1

// `vfio_mediate_dirty_ops.exactness`: reports just what the device wrote.
#define VFIO_MEDIATE_DIRTY_EXACT 1

// `vfio_mediate_dirty_ops.exactness`: may report more, never less.
#define VFIO_MEDIATE_DIRTY_SUPERSET 2

// `vfio_mediate_call_context.origin`: an access or request of the client.
#define VFIO_MEDIATE_ORIGIN_CLIENT 1

// `vfio_mediate_call_context.origin`: a step of a migration.
#define VFIO_MEDIATE_ORIGIN_MIGRATION 2

// `vfio_mediate_call_context.origin`: the host's own doing: open, close, events, timers.
#define VFIO_MEDIATE_ORIGIN_HOST 3

// `vfio_mediate_host_services.log`: levels.
#define VFIO_MEDIATE_LOG_ERROR 1

#define VFIO_MEDIATE_LOG_WARN 2

#define VFIO_MEDIATE_LOG_INFO 3

#define VFIO_MEDIATE_LOG_DEBUG 4

#define VFIO_MEDIATE_LOG_TRACE 5

// `vfio_mediate_host_services.request`: reset the device once this call has returned.
#define VFIO_MEDIATE_REQUEST_RESET 1

// `vfio_mediate_host_services.request`: fail the device; `arg` is the errno.
#define VFIO_MEDIATE_REQUEST_FAIL 2

// `vfio_mediate_host_services.request`: switch the trap map once this call has returned; `arg` is `VFIO_MEDIATE_MAP_NORMAL` or `VFIO_MEDIATE_MAP_TRACKING`.
#define VFIO_MEDIATE_REQUEST_MAP 3

// One access to a claimed byte range.
struct vfio_mediate_access {
    uint32_t struct_size;
    // VFIO region index
    uint32_t region;
    // Byte offset inside the region, within the claim
    uint64_t offset;
    // Bytes, 1 or more; an access that straddles claims arrives in ascending pieces
    uint64_t length;
    // On a write the data, which a hook may change before it forwards. On a read the place for the data: zeroed.
    uint8_t *data;
    // 1 for a write, 0 for a read
    uint32_t write;
    uint32_t reserved;
};

// Borrowed bytes: UTF-8 text without a terminating zero, or data. `ptr` may be null when `len` is 0.
struct vfio_mediate_bytes {
    const uint8_t *ptr;
    size_t len;
};

// Region information, in VFIO's words.
struct vfio_mediate_region_info {
    uint32_t struct_size;
    uint32_t index;
    // `VFIO_REGION_INFO_FLAG_*` without CAPS. A hook may clear flags, never set one that the device lacks.
    uint32_t flags;
    uint32_t reserved;
    // Bytes. A hook may make it smaller.
    uint64_t size;
};

// Irq information, in VFIO's words.
struct vfio_mediate_irq_info {
    uint32_t struct_size;
    uint32_t index;
    // `VFIO_IRQ_INFO_*`
    uint32_t flags;
    uint32_t count;
};

// A `VFIO_DEVICE_SET_IRQS` that touches claimed vectors.
struct vfio_mediate_irq_request {
    uint32_t struct_size;
    uint32_t index;
    uint32_t start;
    uint32_t count;
    uint32_t action;
    uint32_t data_kind;
    const uint8_t *bools;
    const int32_t *fds;
};

// Memory that the device can reach and the guest cannot see.
struct vfio_mediate_scratch {
    uint32_t struct_size;
    // In: the device reaches only addresses below 2 to this power; 0 when it reaches all
    uint32_t address_bits;
    uint64_t iova;
    uint64_t length;
    // The same memory in this process. The device may write it at any time.
    uint8_t *ptr;
};

// The host's side of the ABI. The table and its functions live as long as the process; none of them is null.
struct vfio_mediate_host_services {
    uint32_t struct_size;
    uint16_t abi_major;
    uint16_t abi_minor;
    // Any thread, any time, without a context. The host limits its rate.
    void (*log)(uint32_t level, struct vfio_mediate_bytes target, struct vfio_mediate_bytes message);
    // Reads the device itself, past every hook. ENODEV once the device is lost, EIO where it cannot be reached.
    int32_t (*region_read)(const struct vfio_mediate_call_context *ctx,
                           uint32_t region,
                           uint64_t offset,
                           uint8_t *data,
                           size_t length);
    int32_t (*region_write)(const struct vfio_mediate_call_context *ctx,
                            uint32_t region,
                            uint64_t offset,
                            const uint8_t *data,
                            size_t length);
    // What the host does where a hook forwards: for a hook that wants to see the result.
    int32_t (*default_rw)(const struct vfio_mediate_call_context *ctx, struct vfio_mediate_access *access);
    int32_t (*default_region_info)(const struct vfio_mediate_call_context *ctx, struct vfio_mediate_region_info *info);
    int32_t (*default_irq_info)(const struct vfio_mediate_call_context *ctx, struct vfio_mediate_irq_info *info);
    int32_t (*default_set_irqs)(const struct vfio_mediate_call_context *ctx, const struct vfio_mediate_irq_request *request);
    // Guest memory by IOVA. EFAULT where nothing (or nothing writable) is mapped; then nothing was copied. A write is
    // marked dirty by the host.
    int32_t (*guest_read)(const struct vfio_mediate_call_context *ctx, uint64_t iova, uint8_t *data, size_t length);
    int32_t (*guest_write)(const struct vfio_mediate_call_context *ctx, uint64_t iova, const uint8_t *data, size_t length);
    // The device wrote (or may have written) these bytes. Unmapped parts are ignored and reported by EFAULT.
    int32_t (*mark_dirty)(const struct vfio_mediate_call_context *ctx, uint64_t iova, uint64_t length);
    // `scratch.length` in, a multiple of 4096 and at most 16 MiB; the rest out. Freed at `close` at the latest.
    int32_t (*scratch_alloc)(const struct vfio_mediate_call_context *ctx, struct vfio_mediate_scratch *scratch);
    int32_t (*scratch_free)(const struct vfio_mediate_call_context *ctx, uint64_t iova);
    // Signals the client's eventfd of this vector, if it has one.
    int32_t (*irq_inject)(const struct vfio_mediate_call_context *ctx, uint32_t index, uint32_t vector);
    // Asks for a change that must not happen inside a hook: queued, and done after the call has returned. `REQUEST_*`.
    int32_t (*request)(const struct vfio_mediate_call_context *ctx, uint32_t what, uint64_t arg);
    // The device's clock in nanoseconds: monotonic, virtual for simulated devices.
    uint64_t (*now)(const struct vfio_mediate_call_context *ctx);
    // Waits on that clock. ECANCELED when the call was cancelled, ETIMEDOUT at the context's deadline.
    int32_t (*wait)(const struct vfio_mediate_call_context *ctx, uint64_t nanoseconds);
    // 1 when the caller has given up.
    int32_t (*cancelled)(const struct vfio_mediate_call_context *ctx);
    // One-shot `VFIO_MEDIATE_EVENT_TIMER` with this cookie; setting it again moves it. At most 16 cookies a device, else ENOSPC.
    int32_t (*timer_arm)(const struct vfio_mediate_call_context *ctx, uint64_t cookie, uint64_t nanoseconds);
    int32_t (*timer_cancel)(const struct vfio_mediate_call_context *ctx, uint64_t cookie);
    // A table for `id` (`vfio-mediate.name/1`), or null. The host's own pointer comes with the context.
    const void *(*get_extension)(const struct vfio_mediate_call_context *ctx, struct vfio_mediate_bytes id);
};

// Comes with every call into a plug-in, and goes back with every call into the host. Valid on this thread until the
// call returns; it carries the pass through the device's gate, so services never wait for the gate.
struct vfio_mediate_call_context {
    uint32_t struct_size;
    // `ORIGIN_*`
    uint32_t origin;
    const struct vfio_mediate_host_services *services;
    // The host's own
    const void *host;
    // When the caller gives up, in nanoseconds of `now`'s clock; `UINT64_MAX` when there is no limit
    uint64_t deadline;
};

// Which device this is. Valid during the call only.
struct vfio_mediate_device_identity {
    uint32_t struct_size;
    uint32_t backend;
    uint16_t vendor_id;
    uint16_t device_id;
    uint16_t subsystem_vendor_id;
    uint16_t subsystem_device_id;
    // base class, subclass, programming interface in bits 23:0
    uint32_t class_code;
    uint8_t revision;
    uint8_t reserved[3];
    uint32_t num_regions;
    uint32_t num_irqs;
    // The PCI address, or a simulated device's name
    struct vfio_mediate_bytes name;
    // The first 256 bytes of configuration space as they were at open
    struct vfio_mediate_bytes config;
};

// A PCI function that a plug-in wants to be asked about. `VFIO_MEDIATE_ANY_ID` matches everything.
struct vfio_mediate_device_match {
    uint32_t vendor_id;
    uint32_t device_id;
    uint32_t subsystem_vendor_id;
    uint32_t subsystem_device_id;
};

// A plug-in's own pointer, handed back to it untouched.
typedef void *vfio_mediate_opaque;

// A question: where may the client map?
struct vfio_mediate_mmap_request {
    uint32_t struct_size;
    uint32_t region;
    // Byte range inside the claim, on page boundaries
    uint64_t offset;
    uint64_t length;
    // Out, on HANDLED: a file whose pages `fd_offset ..` are mapped in place of the device's. The host duplicates it.
    int32_t fd;
    uint32_t reserved;
    uint64_t fd_offset;
};

// What one claim intercepts. A null hook is passthrough and costs nothing.
struct vfio_mediate_region_hooks {
    uint32_t struct_size;
    uint32_t reserved;
    // Called for every read and write of a byte of the claim. In states RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P;
    // for configuration space after the permission filter, and in STOP and RESUMING too. Null: the bytes reach the
    // device, but are still not mapped.
    int32_t (*rw)(vfio_mediate_opaque state, vfio_mediate_opaque data, const struct vfio_mediate_call_context *ctx, struct vfio_mediate_access *access);
    // May narrow what the client is told of the region. Null: the device's own.
    int32_t (*region_info)(vfio_mediate_opaque state, vfio_mediate_opaque data, const struct vfio_mediate_call_context *ctx, struct vfio_mediate_region_info *info);
    // FORWARD or a negative number: the range is not mapped (it is claimed). HANDLED: the file that the request names
    // is mapped instead. Null: not mapped.
    int32_t (*mmap)(vfio_mediate_opaque state, vfio_mediate_opaque data, const struct vfio_mediate_call_context *ctx, struct vfio_mediate_mmap_request *request);
};

// One claimed byte range of one region, with its hooks.
//
// In each map (normal, tracking) the claims of one region must not overlap. Every byte of the range loses its mmap
// while the claim holds, unless the `mmap` hook gives one of its own.
struct vfio_mediate_region_claim {
    uint32_t struct_size;
    // VFIO region index
    uint32_t region;
    // Byte range inside the region; `length` is not 0
    uint64_t offset;
    uint64_t length;
    // `MAP_*` bits, at least one
    uint32_t maps;
    uint32_t reserved;
    const struct vfio_mediate_region_hooks *hooks;
    // Handed to each hook
    vfio_mediate_opaque data;
};

// What an irq claim intercepts.
struct vfio_mediate_irq_hooks {
    uint32_t struct_size;
    uint32_t reserved;
    // May narrow what the client is told. Null: the device's own.
    int32_t (*irq_info)(vfio_mediate_opaque state, vfio_mediate_opaque data, const struct vfio_mediate_call_context *ctx, struct vfio_mediate_irq_info *info);
    // Null: passes.
    int32_t (*set_irqs)(vfio_mediate_opaque state,
                        vfio_mediate_opaque data,
                        const struct vfio_mediate_call_context *ctx,
                        const struct vfio_mediate_irq_request *request);
    // A vector fired. HANDLED swallows it, FORWARD passes it on. Interposes the host's eventfd between the device and
    // the client. Null: the device signals the client directly.
    int32_t (*fired)(vfio_mediate_opaque state, vfio_mediate_opaque data, const struct vfio_mediate_call_context *ctx, uint32_t index, uint32_t vector);
};

// Claimed vectors `start .. start + count` of one irq index.
struct vfio_mediate_irq_claim {
    uint32_t struct_size;
    // VFIO irq index
    uint32_t index;
    uint32_t start;
    uint32_t count;
    const struct vfio_mediate_irq_hooks *hooks;
    vfio_mediate_opaque data;
};

// A region that the plug-in adds. Its index is the device's own count plus its position in the list, and stays so
// for the device's life.
struct vfio_mediate_extra_region {
    uint32_t struct_size;
    // `VFIO_REGION_INFO_FLAG_READ | WRITE`
    uint32_t flags;
    uint64_t size;
    // For the region-type capability
    uint32_t type_;
    uint32_t subtype;
    // `rw` must not be null: there is no device behind this region
    const struct vfio_mediate_region_hooks *hooks;
    vfio_mediate_opaque data;
};

// An irq index that the plug-in adds, numbered like `vfio_mediate_extra_region`.
struct vfio_mediate_extra_irq {
    uint32_t struct_size;
    // `VFIO_IRQ_INFO_*`
    uint32_t flags;
    uint32_t count;
    uint32_t reserved;
};

// Why a device is refused. Text for people.
struct vfio_mediate_reason {
    // The host's buffer, to be filled with UTF-8
    uint8_t *text;
    size_t capacity;
    size_t length;
};

// What is left to send, in bytes.
struct vfio_mediate_remaining {
    uint32_t struct_size;
    uint32_t reserved;
    // Not yet sent once; should have been sent and loaded before the switchover
    uint64_t initial_bytes;
    // Sent once and changed since
    uint64_t dirty_bytes;
    // The whole of STOP_COPY; `UINT64_MAX` when unknown
    uint64_t stop_copy_bytes;
};

// Save, restore and the arcs between states. Called by the host's migration, one at a time.
struct vfio_mediate_migration_ops {
    uint32_t struct_size;
    uint32_t reserved;
    // `MIGRATION_*`
    uint64_t flags;
    // Describes this device for the other side: model, firmware, format version. Writes at most `capacity` bytes and
    // stores the count; ERANGE when they do not suffice. Any state but ERROR. Null: nothing to compare.
    int32_t (*match_data)(vfio_mediate_opaque state,
                          const struct vfio_mediate_call_context *ctx,
                          uint8_t *buffer,
                          size_t capacity,
                          size_t *length);
    // Called at the destination, before anything moves, with the source's match data: can its state be loaded here?
    // A refusal fills in `reason`. Null: equal match data are required.
    int32_t (*check_match)(vfio_mediate_opaque state,
                           const struct vfio_mediate_call_context *ctx,
                           const uint8_t *data,
                           size_t length,
                           struct vfio_mediate_reason *reason);
    // One arc of the state machine, never a longer path. On failure the device is left in `*actual` (which comes set
    // to `from`), and the host goes on from there: recover, else reset. `VFIO_MEDIATE_STATE_ERROR` asks for a reset.
    int32_t (*set_state)(vfio_mediate_opaque state,
                         const struct vfio_mediate_call_context *ctx,
                         uint32_t from,
                         uint32_t to,
                         uint32_t *actual);
    // Fills `buffer` with the next bytes of the state and stores their count. `VFIO_MEDIATE_SAVE_MORE` or `VFIO_MEDIATE_SAVE_END`. In
    // PRE_COPY, PRE_COPY_P2P and STOP_COPY: one stream. Buffers of the host are initialised memory.
    int32_t (*save)(vfio_mediate_opaque state,
                    const struct vfio_mediate_call_context *ctx,
                    uint8_t *buffer,
                    size_t capacity,
                    size_t *length);
    // Takes the next bytes of the state, cut anywhere. In RESUMING. The arc RESUMING -> STOP validates the whole.
    int32_t (*load)(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, const uint8_t *data, size_t length);
    // How much is left. In any state. Null: unknown.
    int32_t (*remaining)(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, struct vfio_mediate_remaining *remaining);
};

// A range of I/O virtual addresses, in bytes.
struct vfio_mediate_iova_range {
    uint64_t iova;
    uint64_t length;
};

// What a plug-in knows of the pages that its device writes.
struct vfio_mediate_dirty_ops {
    uint32_t struct_size;
    // `DIRTY_*`
    uint32_t exactness;
    // Starts tracking `ranges` (ascending, disjoint, page-aligned). The host has switched to the tracking map and
    // drained accesses under the normal one before. Failing leaves nothing started.
    int32_t (*start)(vfio_mediate_opaque state,
                     const struct vfio_mediate_call_context *ctx,
                     const struct vfio_mediate_iova_range *ranges,
                     size_t count,
                     uint64_t page_size);
    // Sets (never clears) bit i of `bitmap` (little-endian words) for page i of `iova ..` written since the last
    // report. May also use `mark_dirty` while running. An error makes the host take the whole range as dirty.
    int32_t (*report)(vfio_mediate_opaque state,
                      const struct vfio_mediate_call_context *ctx,
                      uint64_t iova,
                      uint64_t length,
                      uint64_t page_size,
                      uint64_t *bitmap);
    void (*stop)(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx);
};

// Something happened to a device.
struct vfio_mediate_event {
    uint32_t struct_size;
    // `EVENT_*`; a plug-in ignores kinds that it does not know
    uint32_t kind;
    uint64_t args[3];
};

// What `open` fills in. All that it points to lives until `close` returns.
struct vfio_mediate_device_ops {
    uint32_t struct_size;
    uint32_t reserved;
    // Handed to each function of this device
    vfio_mediate_opaque state;
    const struct vfio_mediate_region_claim *regions;
    size_t region_count;
    const struct vfio_mediate_irq_claim *irqs;
    size_t irq_count;
    const struct vfio_mediate_extra_region *extra_regions;
    size_t extra_region_count;
    const struct vfio_mediate_extra_irq *extra_irqs;
    size_t extra_irq_count;
    // Null: the plug-in does not save or restore the device (its own driver may)
    const struct vfio_mediate_migration_ops *migration;
    // Null: the plug-in does not track dirty pages
    const struct vfio_mediate_dirty_ops *dirty;
    // Called after the fact, on any thread, never concurrently with itself. A negative answer to `VFIO_MEDIATE_EVENT_DMA_MAP` or
    // `VFIO_MEDIATE_EVENT_RESET_PREPARE` refuses it; other answers are logged. Null: no interest.
    int32_t (*event)(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, const struct vfio_mediate_event *event);
    // The last call for this device; no hook is in flight. `ctx` still reaches the device. Null: nothing to free.
    void (*close)(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx);
};

// A plug-in: who it is, which devices it knows, how to open one.
struct vfio_mediate_plugin {
    uint32_t struct_size;
    uint32_t reserved;
    // Identifies the plug-in: 1 to 64 bytes of `[a-z0-9_-]`. Two versions of one plug-in share it.
    struct vfio_mediate_bytes name;
    // Semantic version, 1 to 64 bytes
    struct vfio_mediate_bytes version;
    // For people, 0 to 128 bytes
    struct vfio_mediate_bytes vendor;
    // Devices to be asked about. An empty list matches nothing.
    const struct vfio_mediate_device_match *matches;
    size_t match_count;
    // Called once, before the first `probe`, on the thread that registers. Stores what the plug-in needs for all its
    // devices in `state`. Null: nothing to do.
    int32_t (*init)(const struct vfio_mediate_host_services *services, vfio_mediate_opaque *state);
    // Claim or decline: `VFIO_MEDIATE_PROBE_CLAIM`, `VFIO_MEDIATE_PROBE_DECLINE`, or `-errno` when the device is the plug-in's and cannot be
    // served (the open fails then; declining is not failing). May only look at `identity`. Null: claims what matches.
    int32_t (*probe)(vfio_mediate_opaque state, const struct vfio_mediate_device_identity *identity);
    // Opens a device that was claimed. `ops` comes zeroed, with its `struct_size` set, and is filled in. The device
    // may be read and written through `ctx`; it is in state RUNNING. After a failure `close` is not called.
    int32_t (*open)(vfio_mediate_opaque state,
                    const struct vfio_mediate_call_context *ctx,
                    const struct vfio_mediate_device_identity *identity,
                    struct vfio_mediate_device_ops *ops);
    // Called once when the last reference has gone; afterwards no code of the plug-in runs again. Null: nothing to do.
    void (*retire)(vfio_mediate_opaque state);
    // A table for `id` (`vendor.name/1`), or null. Null: no extensions.
    const void *(*get_extension)(vfio_mediate_opaque state, struct vfio_mediate_bytes id);
};

// The exported symbol. The host reads it before it runs anything of the plug-in.
//
// A Rust plug-in points `rust_header` at its sdk's `RUST_HEADER`, whose layout the host compares with its own in both
// directions. A C plug-in leaves it null and is checked by `abi_major`, `struct_size` and `fingerprint`, which the
// generated header defines.
struct vfio_mediate_entry {
    // `VFIO_MEDIATE_ENTRY_MAGIC`
    uint64_t magic;
    // `sizeof(Entry)` as the plug-in was compiled
    uint32_t struct_size;
    uint16_t abi_major;
    uint16_t abi_minor;
    // `ABI_FINGERPRINT` as the plug-in was compiled: a hash over the sizes and offsets of every structure of the ABI
    uint64_t fingerprint;
    // `ENTRY_*` bits; unknown bits are refused
    uint32_t flags;
    uint32_t reserved;
    // `RustHeader`, or null for a plug-in that is not written in Rust
    const void *rust_header;
    // Never null
    const struct vfio_mediate_plugin *plugin;
};

#endif  /* VFIO_MEDIATE_H */
