"""Programs to start from, one file each: a control loop, a ROS 2 node, a viewer."""
