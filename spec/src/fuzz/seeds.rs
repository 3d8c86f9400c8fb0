//! Where a fuzzer begins: one valid message of each command, what comes back, and inputs that were trouble elsewhere.

const JSON: &[u8] = br#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"max_dma_maps":65535,"pgsizes":4096,"twin_socket":{"supported":true},"write_multiple":true,"migration":{"pgsize":4096,"max_bitmap_size":1048576}}}"#;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn region(offset: u64, region: u32, count: u32, data: &[u8]) -> Vec<u8> {
    joined(&[&longs(&[offset]), &words(&[region, count]), data])
}

/// Name, command, descriptors, payload: what a client may send.
fn requests() -> Vec<(&'static str, u16, u8, Vec<u8>)> {
    let (get, set, probe) = (1 << 16, 1 << 17, 1 << 18);
    let multi = joined(&[&longs(&[2]), &region(0, 2, 8, &[1; 8]), &region(8, 2, 3, &[2; 8])]);
    let ranges =
        joined(&[&words(&[56, 6 | set]), &longs(&[4096]), &words(&[2, 0]), &longs(&[0, 4096, 0x10000, 0x2000])]);
    vec![
        ("version", 1, 0, joined(&[&[0, 0, 1, 0], JSON, &[0]])),
        ("version_alone", 1, 0, vec![0, 0, 0, 0]),
        ("version_without_nul", 1, 0, b"\0\0\0\0{}".to_vec()),
        ("dma_map", 2, 0, joined(&[&words(&[32, 3]), &longs(&[0, 0x10000, 0x2000])])),
        ("dma_map_file", 2, 1, joined(&[&words(&[32, 1]), &longs(&[0x1000, 0x20000, 0x2000])])),
        ("dma_unmap", 3, 0, joined(&[&words(&[24, 0]), &longs(&[0x10000, 0x2000])])),
        ("dma_unmap_all", 3, 0, joined(&[&words(&[24, 2]), &longs(&[0, 0])])),
        ("dma_unmap_dirty", 3, 0, joined(&[&words(&[48, 1]), &longs(&[0x10000, 0x2000, 4096, 8])])),
        ("get_info", 4, 0, words(&[16, 0, 0, 0])),
        ("region_info", 5, 0, words(&[32, 0, 2, 0, 0, 0, 0, 0])),
        ("region_io_fds", 6, 0, words(&[16, 0, 0, 0])),
        ("irq_info", 7, 0, words(&[16, 0, 1, 0])),
        ("set_irqs", 8, 2, words(&[20, 0x24, 2, 0, 2])),
        ("set_irqs_bool", 8, 0, joined(&[&words(&[23, 0x22, 2, 0, 3]), &[1, 0, 1]])),
        ("set_irqs_none", 8, 0, words(&[20, 0x21, 2, 0, 0])),
        ("region_read", 9, 0, region(0, 7, 64, &[])),
        ("region_write", 10, 0, region(4, 0, 4, &[1, 2, 3, 4])),
        ("dma_read", 11, 0, longs(&[0x10000, 4])),
        ("dma_write", 12, 0, joined(&[&longs(&[0x10000, 4]), &[1, 2, 3, 4]])),
        ("reset", 13, 0, vec![]),
        ("removed", 14, 0, vec![1, 2, 3]),
        ("write_multi", 15, 0, multi),
        ("write_multi_overflow", 15, 0, joined(&[&longs(&[u64::MAX / 24 + 1]), &region(0, 2, 8, &[1; 8])])),
        ("feature_migration", 16, 0, words(&[16, 1 | get])),
        ("feature_state", 16, 0, words(&[16, 2 | get])),
        ("feature_set_state", 16, 0, words(&[16, 2 | set, 3, 0])),
        // A heap over-read elsewhere.
        ("feature_set_state_without_data", 16, 0, words(&[16, 2 | set])),
        ("feature_set_state_last", 16, 0, words(&[16, 2 | set, 8, 0])),
        ("feature_probe", 16, 0, words(&[8, 6 | set | probe])),
        ("feature_low_power", 16, 0, words(&[8, 3 | set])),
        ("feature_low_power_wakeup", 16, 1, words(&[16, 4 | set, 0, 0])),
        ("feature_low_power_exit", 16, 0, words(&[8, 5 | set])),
        ("feature_logging_start", 16, 0, ranges),
        ("feature_logging_everything", 16, 0, words(&[24, 6 | set, 0x10000, 0, 0, 0])),
        ("feature_logging_stop", 16, 0, words(&[8, 7 | set])),
        // An endless loop elsewhere: finer than the log.
        ("feature_logging_report", 16, 0, words(&[40, 8 | get, 0x10000, 0, 0x2001, 0, 4096, 0])),
        ("mig_data_read", 17, 0, words(&[72, 64])),
        ("mig_data_read_huge", 17, 0, words(&[u32::MAX, u32::MAX - 8])),
        ("mig_data_write", 18, 0, joined(&[&words(&[12, 4]), &[1, 2, 3, 4]])),
        ("unknown", 99, 0, vec![0xa5; 40]),
    ]
}

/// For [`super::wire`].
pub fn wire() -> Vec<(&'static str, Vec<u8>)> {
    let mut seeds: Vec<_> = requests()
        .into_iter()
        .map(|(name, command, fds, payload)| (name, joined(&[&[command as u8, fds.div_ceil(2)], &payload])))
        .collect();
    let sparse =
        joined(&[&[1, 0, 1, 0, 72, 0, 0, 0], &words(&[1, 0]), &longs(&[0x1000, 0xf000]), &[3, 0, 1, 0], &words(&[0])]);
    let info = joined(&[&words(&[80, 15, 2, 32]), &longs(&[0x10000, 0]), &sparse]);
    let entry = joined(&[&longs(&[0x10, 4]), &words(&[0, 0, 1, 0]), &longs(&[7])]);
    let access = longs(&[0x10000, 4]);
    let replies: [(&'static str, u8, Vec<u8>); 12] = [
        ("reply_header", 0x80, words(&[0x0009_0001, 16, 0x21, 22])),
        ("reply_version", 0x81, joined(&[&[0, 0, 1, 0], JSON, &[0]])),
        ("reply_get_info", 0x82, words(&[16, 3, 9, 5])),
        ("reply_region_info", 0x83, info),
        ("reply_irq_info", 0x84, words(&[16, 9, 1, 1])),
        ("reply_region_io_fds", 0x85, joined(&[&words(&[56, 0, 0, 1]), &entry])),
        ("reply_dma_write", 0x86, access.clone()),
        ("reply_dma_write_short", 0x87, access[..12].to_vec()),
        ("reply_dma_read", 0x88, joined(&[&access, &[1, 2, 3, 4]])),
        ("reply_feature", 0x89, words(&[16, 1 | 1 << 16, 3, 0])),
        ("reply_mig_data_read", 0x8a, joined(&[&words(&[12, 4]), &[1, 2, 3, 4]])),
        ("reply_write_multi", 0x8b, longs(&[2])),
    ];
    seeds.extend(replies.into_iter().map(|(name, which, payload)| (name, joined(&[&[which, 1], &payload]))));
    seeds
}

fn message(command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = u32::from(command) << 16 | 1;
    joined(&[&words(&[head, 16 + payload.len() as u32, flags, 0]), payload])
}

/// One step that receives `bytes` with `fds` descriptors.
fn receive(bytes: &[u8], fds: u8) -> Vec<u8> {
    joined(&[&[fds * 8], &(bytes.len() as u16).to_le_bytes(), bytes])
}

const SERVE: &[u8] = &[4];

/// For [`super::session`].
pub fn session() -> Vec<(&'static str, Vec<u8>)> {
    let begun = |steps: &[Vec<u8>]| joined(&[&[1], &steps.concat()]);
    let mut seeds: Vec<_> = requests()
        .into_iter()
        .map(|(name, command, fds, payload)| {
            let request = receive(&message(command, 0, &payload), fds);
            // Behind a map, so that there is something to unmap and to log.
            let map = joined(&[&words(&[32, 3]), &longs(&[0, 0x10000, 0x2000])]);
            let before = if command == 1 || command == 2 { vec![] } else { receive(&message(2, 0, &map), 0) };
            match command {
                1 => (name, joined(&[&[0], &request, SERVE, &receive(&message(4, 0, &words(&[16, 0, 0, 0])), 0)])),
                _ => (name, begun(&[before, request, SERVE.to_vec()])),
            }
        })
        .collect();
    let get_info = message(4, 0, &words(&[16, 0, 0, 0]));
    let in_pieces = get_info.iter().flat_map(|byte| receive(&[*byte], 0)).collect();
    let (ask_read, ask_write, ask_batch, take, abandon, answer) = (6, 14, 22, 30, 38, 7);
    let wrong = message(11, 1, &longs(&[0x5000, 85]));
    seeds.extend([
        ("byte_by_byte", begun(&[in_pieces, SERVE.to_vec()])),
        ("no_reply", begun(&[receive(&message(10, 0x10, &region(0, 99, 4, &[0; 4])), 0), SERVE.to_vec()])),
        ("neither_command_nor_reply", begun(&[receive(&message(4, 7, &[]), 0), SERVE.to_vec()])),
        ("too_short", begun(&[receive(&words(&[0x0004_0001, 15, 0, 0]), 3), SERVE.to_vec()])),
        ("too_long", begun(&[receive(&words(&[0x0004_0001, 0x0010_0021, 0, 0]), 3), SERVE.to_vec()])),
        ("never_whole", begun(&[receive(&words(&[0x000a_0001, 0x0010_0020, 0, 0]), 3)])),
        ("too_many_descriptors", begun(&[joined(&[&[7 * 8], &32_u16.to_le_bytes(), &get_info]), SERVE.to_vec()])),
        ("dma_read_answered", begun(&[vec![ask_read, 5, answer, take, 0], SERVE.to_vec()])),
        ("dma_write_answered", begun(&[vec![ask_write, 5, answer, take, 0], SERVE.to_vec()])),
        ("dma_batch_answered", begun(&[vec![ask_batch, 9, answer, take, 0], SERVE.to_vec()])),
        ("dma_abandoned", begun(&[vec![ask_read, 5, abandon, 0, ask_read, 6, answer, take, 0], SERVE.to_vec()])),
        ("dma_answered_wrongly", begun(&[vec![ask_read, 5], receive(&wrong, 1), vec![take, 0], SERVE.to_vec()])),
        ("dma_before_version", joined(&[&[0], &[ask_read, 5, take, 0]])),
        ("reply_to_nothing", begun(&[receive(&message(12, 1, &longs(&[0, 4])), 5), SERVE.to_vec()])),
    ]);
    seeds
}
