// gRPC's own log lines.
#pragma once

namespace slalom {

// Sends them to our log, below debug: what matters comes as an Error. To be called before gRPC is
// used; for the whole process, as gRPC has it.
void ForwardGrpcLog();

// A listener of gRPC 1.51 that has once found no free descriptor takes no connection any more, for
// good, and tells nobody but its log.
bool GrpcStoppedAccepting();

}  // namespace slalom
