// What follows from a study, from the JSON that `study show --json` prints (section 1).

/** The study as member.mjs wants it. */
export function readStudy(shown) {
    const { derived } = shown;
    const { roster } = derived;
    if (derived.phases !== 1 || derived.pace !== "synchronous" || !derived.schedule.steady || derived.directed) throw new Error("only plain averaging on a steady graph");
    const graph = Object.fromEntries(roster.map((name) => [name, []]));
    for (const { members: [a, b], kind } of derived.edges) {
        if (kind !== "zeromq") throw new Error(`no ${kind} here`);
        graph[a].push(b);
        graph[b].push(a);
    }
    for (const list of Object.values(graph)) list.sort((a, b) => roster.indexOf(a) - roster.indexOf(b));
    const [{ channels }] = derived.channels;
    const hex = (text) => Buffer.from(text, "hex");
    const rule = derived.stop_rule;
    return {
        roster, graph,
        digest: hex(shown.digest), layout: hex(derived.parameters.digest), start: hex(derived.start.digest),
        identities: Object.fromEntries(roster.map((name) => [name, hex(derived.keys[name].identity)])),
        curve: Object.fromEntries(roster.map((name) => [name, derived.keys[name].curve])),
        addresses: Object.fromEntries((shown.members ?? []).map(({ name, address }) => [name, [address].flat()[0]])),
        dials: Object.fromEntries(derived.edges.map(({ members, dials }) => [members.join(" "), dials])),
        weights: Object.fromEntries(roster.map((name) => [name, derived.weights[0][name].from])),
        dtype: channels[0][1], format: { channels, full: null }, ahead: derived.ahead, lastExchange: derived.last_exchange, rounds: derived.training_rounds,
        firstNorm: derived.largest_norm.first_norm, startRule: { needed: derived.start_agreement.needed, within_s: derived.start_agreement.within_s },
        stopRule: rule && { tolerance: rule.tolerance, patience: rule.patience, diameter: rule.diameter, lambda_2: rule.lambda_2, rounds: derived.training_rounds },
        heartbeat: derived.deadlines.heartbeat_s,
        distance: (a, b) => distance(graph, a, b),
    };
}

/** Links from one member to another. */
function distance(graph, from, to) {
    const links = new Map([[from, 0]]);
    for (const [name, n] of links) for (const other of graph[name]) if (!links.has(other)) links.set(other, n + 1);
    return links.get(to) ?? Infinity;
}
